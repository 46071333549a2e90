#include "cuda/group/agreement.h"

#include "python_call.h"

namespace sgl_comm::cuda {

void AgreedCall::count_refusal() const {
  DeviceCommunicator* const communicators[] = {group->push.serving(), group->pull.serving()};
  if (const DeviceCommunicator* const comm = group->serving()) comm->ledger().count_refusal();
  for (DeviceCommunicator* comm : communicators) {
    if (comm != nullptr) comm->publish_refusals();
  }
}

// Through Python: the dispatcher would lose an error's cause.
void compare_calls(const char* op, const std::string& group_name, const std::string& text, bool refused) {
  const python::Gil gil;
  const python::Ref compare = python::import("torch").attr("ops").attr("sgl_comm").attr("_compare_calls");
  const python::Ref found(compare ? PyObject_CallFunction(compare.get(), "sssO", group_name.c_str(), op, text.c_str(),
                                                          refused ? Py_True : Py_False)
                                  : nullptr);
  if (!found) fail("sgl_comm::", op, ": the calls of the ranks could not be compared: ", python::take_error());
  const std::string reason = python::to_string(found);
  if (!reason.empty()) fail(reason);
}

}  // namespace sgl_comm::cuda
