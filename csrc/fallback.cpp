// The fallback by NCCL or gloo. Both libraries have a copy, since they share no symbols.
#include "fallback.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <vector>

#include "python_call.h"
#include "rows.h"

// The dispatcher cannot be used: torch 2.15 takes the names as `Any`, which the stable ABI does not convert. These two
// are what torch's own ahead-of-time compiler calls; libtorch_cpu has them from 2.11 to 2.15 at least, for every
// device. Weak, so that a torch without them costs the fallback and not the library.
extern "C" {
__attribute__((weak)) AOTITorchError aoti_torch_cpu__c10d_functional_all_reduce(AtenTensorHandle input,
                                                                                const char* reduce_op,
                                                                                const char* group_name,
                                                                                AtenTensorHandle* out);
__attribute__((weak)) AOTITorchError aoti_torch_cpu__c10d_functional_wait_tensor(AtenTensorHandle input,
                                                                                 AtenTensorHandle* out);
}

namespace sgl_comm::fallback {

namespace {

// torch.ops._c10d_functional.NAME(*arguments, **keywords): Python's own door, open in every torch. What it gives is
// still under way. Null, with Python's error set, where it failed. Needs the GIL.
python::Ref start_functional(const char* name, const python::Ref& arguments, const python::Ref& keywords) {
  // Where one of these is null Python's error is set, and nothing may be called until it is taken.
  const python::Ref functional =
      arguments && keywords ? python::import("torch").attr("ops").attr("_c10d_functional") : python::Ref(nullptr);
  const python::Ref start = functional.attr(name);
  return python::Ref(start ? PyObject_Call(start.get(), arguments.get(), keywords.get()) : nullptr);
}

// Waits for what start_functional() has started.
python::Ref wait_functional(const python::Ref& pending) {
  const python::Ref wait =
      pending ? python::import("torch").attr("ops").attr("_c10d_functional").attr("wait_tensor") : python::Ref(nullptr);
  return python::Ref(wait ? PyObject_CallFunctionObjArgs(wait.get(), pending.get(), nullptr) : nullptr);
}

[[noreturn]] void fail_functional(const char* op, const Tensor& input, const std::string& group_name) {
  fail("sgl_comm::", op, ": the fallback to the own backend of group '", group_name, "' (NCCL or gloo) failed on ",
       describe(input), ": ", python::take_error());
}

Tensor call_functional(const char* op, const char* name, const Tensor& input, const std::string& group_name,
                       const python::Ref& arguments, const python::Ref& keywords) {
  Tensor result = python::to_tensor(wait_functional(start_functional(name, arguments, keywords)));
  if (!result.defined()) fail_functional(op, input, group_name);
  return result;
}

// The broadcasts of pieces that are under way. Its destructor waits for all of them: they may still write.
class PendingBroadcasts {
 public:
  PendingBroadcasts(const char* op, const Tensor& input, const std::string& group_name)
      : op_(op), input_(input), group_name_(group_name) {}
  PendingBroadcasts(const PendingBroadcasts&) = delete;
  PendingBroadcasts& operator=(const PendingBroadcasts&) = delete;
  ~PendingBroadcasts() {
    const python::Gil gil;
    for (; next_ < pending_.size(); ++next_) {
      wait_functional(pending_[next_]);
      PyErr_Clear();
    }
    pending_.clear();
  }

  void start(const Tensor& bytes, int64_t src) {
    const python::Gil gil;
    const python::Ref moved = python::from_tensor(bytes);
    const python::Ref arguments(
        Py_BuildValue("(O L s)", moved.get(), static_cast<long long>(src), group_name_.c_str()));
    pending_.push_back(start_functional("broadcast_", arguments, python::Ref(PyDict_New())));
    if (!pending_.back()) fail();
  }

  void wait_for_next() {
    const python::Gil gil;
    if (!wait_functional(pending_[next_++])) fail();
  }

 private:
  [[noreturn]] void fail() { fail_functional(op_, input_, group_name_); }

  const char* op_;
  const Tensor& input_;
  const std::string& group_name_;
  std::vector<python::Ref> pending_;
  size_t next_ = 0;
};

// Row-major memory as bytes, which every backend moves, whatever the dtype: `length` of them from `first` on. Owns
// nothing.
Tensor bytes_of(const Tensor& tensor, int64_t first, int64_t length) {
  auto* const data = static_cast<std::byte*>(const_cast<void*>(tensor.const_data_ptr()));
  return torch::stable::from_blob(data + first, {length}, {1}, tensor.device(), torch::headeronly::ScalarType::Byte);
}

Tensor bytes_of(const Tensor& tensor) { return bytes_of(tensor, 0, num_bytes(tensor)); }

}  // namespace

void check_reduce_op(const char* op, const std::string& reduce_op) {
  for (const char* known : {"sum", "avg", "product", "min", "max", "band", "bor", "bxor"}) {
    if (reduce_op == known) return;
  }
  fail("sgl_comm::", op, ": got reduce_op '", reduce_op,
       "'; expected one of sum, avg, product, min, max, band, bor, bxor");
}

Tensor all_reduce(const char* op, const Tensor& input, const std::string& group_name, const std::string& reduce_op) {
  SGL_CHECK(aoti_torch_cpu__c10d_functional_all_reduce != nullptr, op,
            ": this torch has no entrance to NCCL or gloo"
            " that sgl_comm knows, and ",
            describe(input), " with reduce_op '", reduce_op, "' needs one");
  const auto check = [&](AOTITorchError code) {
    SGL_CHECK(code == AOTI_TORCH_SUCCESS, op, ": the fallback to the own backend of group '", group_name,
              "' (NCCL or gloo, reduce_op '", reduce_op, "') failed on ", describe(input),
              "; torch has logged the cause");
  };
  AtenTensorHandle pending = nullptr, done = nullptr;
  check(aoti_torch_cpu__c10d_functional_all_reduce(row_major(input).get(), reduce_op.c_str(), group_name.c_str(),
                                                   &pending));
  const Tensor owner(pending);
  check(aoti_torch_cpu__c10d_functional_wait_tensor(pending, &done));
  return Tensor(done);
}

Tensor reduce_scatter(const char* op, const Tensor& input, const std::string& group_name, int world) {
  scattered_sizes(op, input, world);  // refuses what cannot be divided
  if (world == 1) return fresh_row_major(op, input);
  const Tensor in = row_major(input);
  const python::Gil gil;
  const python::Ref sent = python::from_tensor(in);
  const python::Ref arguments(Py_BuildValue("(O s i s)", sent.get(), "sum", world, group_name.c_str()));
  return call_functional(op, "reduce_scatter_tensor", input, group_name, arguments, python::Ref(PyDict_New()));
}

Tensor all_gather(const char* op, const Tensor& input, const std::string& group_name, int world) {
  Tensor out = empty_row_major(op, input, gathered_sizes(op, input, world).data());
  if (world == 1) return torch::stable::copy_(out, input);
  const Tensor in = row_major(input);  // lives until the bytes have gone
  const python::Gil gil;
  const python::Ref sent = python::from_tensor(bytes_of(in)), received = python::from_tensor(bytes_of(out));
  const python::Ref arguments(Py_BuildValue("(O i s)", sent.get(), world, group_name.c_str()));
  const python::Ref keywords(Py_BuildValue("{sO}", "out", received.get()));
  call_functional(op, "all_gather_into_tensor_out", input, group_name, arguments, keywords);
  return out;
}

void broadcast_in_pieces(const char* op, const Tensor& memory, int64_t src, const std::string& group_name,
                         const Pieces& how) {
  const int64_t total = num_bytes(memory);
  PendingBroadcasts under_way(op, memory, group_name);
  int64_t started = 0;
  const auto start_next = [&] {
    const int64_t length = std::min(how.bytes, total - started);
    how.before_start();
    under_way.start(bytes_of(memory, started, length), src);
    started += length;
  };
  start_next();  // an empty tensor has one piece, too
  if (started < total) start_next();
  int64_t arrived = 0;
  do {
    under_way.wait_for_next();
    if (started < total) start_next();
    const int64_t last = std::min(arrived + how.bytes, total);
    how.arrived(arrived, last);
    arrived = last;
  } while (arrived < total);
}

Tensor broadcast(const char* op, const Tensor& input, int64_t src, const std::string& group_name, int rank) {
  const Tensor out = rank == src ? fresh_row_major(op, input) : empty_row_major(op, input);
  broadcast_in_pieces(op, out, src, group_name, {num_bytes(out) + 1, [] {}, [](int64_t, int64_t) {}});
  return out;
}

void limit_waits(const char* op, const std::string& group_name, double seconds) {
  const python::Gil gil;
  const python::Ref span = python::import("datetime").attr("timedelta");
  const python::Ref limit(span ? PyObject_CallFunction(span.get(), "dd", 0.0, seconds) : nullptr);
  const python::Ref find = limit ? python::import("torch.distributed.distributed_c10d").attr("_resolve_process_group")
                                 : python::Ref(nullptr);
  const python::Ref group(find ? PyObject_CallFunction(find.get(), "s", group_name.c_str()) : nullptr);
  const python::Ref done(group ? PyObject_CallMethod(group.get(), "set_timeout", "O", limit.get()) : nullptr);
  if (!done) fail("sgl_comm::", op, ": cannot limit the waits of group '", group_name, "': ", python::take_error());
}

}  // namespace sgl_comm::fallback
