// Keeps the calls of one communicator in the order in which the host made them, whatever their streams.
#pragma once

#include <cuda_runtime.h>

#include <mutex>

#include "cuda/cuda_check.h"

namespace sgl_comm::cuda {

// Where a stream stands: not capturing (id 0), or in the capture of this id, whose graph so far is `graph`.
struct Capture {
  unsigned long long id = 0;
  cudaGraph_t graph = nullptr;
};

inline Capture capture_of(const char* op, cudaStream_t stream) {
  cudaStreamCaptureStatus status{};
  Capture capture;
#if CUDART_VERSION >= 13000
  SGL_CUDA_CHECK(op, cudaStreamGetCaptureInfo(stream, &status, &capture.id, &capture.graph, nullptr, nullptr, nullptr));
#else
  SGL_CUDA_CHECK(op, cudaStreamGetCaptureInfo_v2(stream, &status, &capture.id, &capture.graph, nullptr, nullptr));
#endif
  return status == cudaStreamCaptureStatusActive ? capture : Capture{};
}

// Eager calls wait for the eager call before them, captured calls for the one before them in the same capture. (What a
// graph's replay is ordered against, its caller decides.) Where the stream is the same there is nothing to do.
class StreamOrder {
 public:
  StreamOrder() = default;
  StreamOrder(const StreamOrder&) = delete;
  StreamOrder& operator=(const StreamOrder&) = delete;
  ~StreamOrder() {
    for (const Last& last : {eager_, captured_}) {
      if (last.event != nullptr) cudaEventDestroy(last.event);
    }
  }

  // At set-up, on the communicator's device.
  void prepare() {
    for (Last* last : {&eager_, &captured_}) {
      SGL_CUDA_CHECK("init", cudaEventCreateWithFlags(&last->event, cudaEventDisableTiming));
    }
  }

  // A call's turn, from before its launch to after it.
  struct Turn {
    std::unique_lock<std::mutex> lock;
    Capture capture;
    bool same_stream;  // as the call before: then the launch may depend on the previous one programmatically
  };

  Turn next(const char* op, cudaStream_t stream) {
    Turn turn{std::unique_lock(mutex_), capture_of(op, stream), true};
    Last& last = turn.capture.id == 0 ? eager_ : captured_;
    if (last.any && last.capture_id == turn.capture.id && last.stream != stream) {
      SGL_CHECK(capture_of(op, last.stream).id == turn.capture.id, op, ": got an eager call while the stream of the",
                " eager call before it is being captured; expected the same stream, or no call in between");
      SGL_CUDA_CHECK(op, cudaEventRecord(last.event, last.stream));
      SGL_CUDA_CHECK(op, cudaStreamWaitEvent(stream, last.event, 0));
      turn.same_stream = false;
    }
    last.any = true;
    last.stream = stream;
    last.capture_id = turn.capture.id;
    return turn;
  }

 private:
  struct Last {
    bool any = false;
    cudaStream_t stream = nullptr;
    unsigned long long capture_id = 0;
    cudaEvent_t event = nullptr;
  };

  std::mutex mutex_;
  Last eager_, captured_;
};

}  // namespace sgl_comm::cuda
