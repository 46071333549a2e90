// A string argument of an op, without a leak.
//
// In torch 2.11's headers the unboxing of a std::string argument forgets to free it. A parameter of type Text is read
// by the code below instead; it is a std::string in all other respects.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>

namespace sgl_comm {

struct Text : std::string {
  using std::string::string;
};

}  // namespace sgl_comm

namespace torch::stable::detail {

template <>
struct ToImpl<sgl_comm::Text> {
  static sgl_comm::Text call(StableIValue value, uint64_t, bool) {
    const StringHandle handle = to<StringHandle>(value);
    size_t length = 0;
    const char* data = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
    TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    sgl_comm::Text text(data, length);
    TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return text;
  }
};

}  // namespace torch::stable::detail
