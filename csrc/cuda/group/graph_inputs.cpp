#include "cuda/group/graph_inputs.h"

#include <cuda.h>

#include <algorithm>
#include <utility>

#include "cuda/cuda_check.h"

namespace sgl_comm::cuda {

namespace {

// Lets this thread make calls that a capture elsewhere forbids, as long as it lives.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  RelaxedCapture& operator=(const RelaxedCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

using PointerGetAttribute = CUresult (*)(void*, CUpointer_attribute, CUdeviceptr);

// The driver's function, asked from the runtime so that the library does not link against the driver.
PointerGetAttribute pointer_get_attribute() {
  static const PointerGetAttribute function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuPointerGetAttribute", &found, 12000, cudaEnableDefault, &result);
#else
    cudaGetDriverEntryPoint("cuPointerGetAttribute", &found, cudaEnableDefault, &result);
#endif
    return reinterpret_cast<PointerGetAttribute>(found);
  }();
  return function;
}

template <typename Value>
bool attribute_of(const void* pointer, CUpointer_attribute attribute, Value& value) {
  const PointerGetAttribute get = pointer_get_attribute();
  return get != nullptr && get(&value, attribute, reinterpret_cast<CUdeviceptr>(pointer)) == CUDA_SUCCESS;
}

}  // namespace

bool GraphInputs::can_be_shared(const void* input) {
  int capable = 0;
  return attribute_of(input, CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE, capable) && capable != 0;
}

GraphInputs::~GraphInputs() {
  int previous = 0;
  cudaGetDevice(&previous);
  cudaSetDevice(device_);
  cudaDeviceSynchronize();
  for (auto& [base, mapping] : mappings_) {
    if (mapping.opened) cudaIpcCloseMemHandle(mapping.address);
  }
  if (table_ != nullptr) cudaFree(table_);
  cudaSetDevice(previous);
}

void GraphInputs::attach(const DeviceGroup& group, int64_t staging_offset) {
  group_ = &group;
  staging_offset_ = staging_offset;
}

void GraphInputs::begin() {
  SGL_CHECK(!noting_, "capture: got a capture() inside a capture(); expected to leave the first one before");
  const DeviceScope scope(device_);
  const RelaxedCapture relaxed;
  if (table_ == nullptr) {
    void* memory = nullptr;
    SGL_CUDA_CHECK("capture", cudaMalloc(&memory, kMaxEntries * sizeof(device::PullEntry)));
    table_ = static_cast<device::PullEntry*>(memory);
    SGL_CUDA_CHECK("capture", cudaMemset(table_, 0, kMaxEntries * sizeof(device::PullEntry)));
    SGL_CUDA_CHECK("capture", cudaDeviceSynchronize());
    free_entries_.resize(kMaxEntries);
    for (int i = 0; i < kMaxEntries; ++i) free_entries_[i] = kMaxEntries - 1 - i;
  }
  release_dropped();
  noted_.clear();  // of a capture() that ended in an error; their graphs still hold the entries
  noting_ = true;
}

std::vector<InputHandle> GraphInputs::end() {
  noting_ = false;
  std::vector<InputHandle> handles;
  const DeviceScope scope(device_);
  const RelaxedCapture relaxed;
  for (Noted& noted : noted_) {
    InputHandle& handle = noted.handle;
    if (handle.state == InputHandle::kShared) {
      void* const base = reinterpret_cast<void*>(handle.base);
      uint64_t buffer_id = 0;
      const bool same = attribute_of(base, CU_POINTER_ATTRIBUTE_BUFFER_ID, buffer_id) && buffer_id == handle.buffer_id;
      if (!same) {
        handle.state = InputHandle::kFreed;
      } else if (cudaIpcGetMemHandle(&handle.ipc, base) != cudaSuccess) {
        cudaGetLastError();
        handle.state = InputHandle::kRefused;
      }
    }
    handles.push_back(handle);
  }
  return handles;
}

GraphInputs::Graph& GraphInputs::graph_of(const char* op, const Capture& capture) {
  const auto known = std::find_if(graphs_.begin(), graphs_.end(), [&](const Graph& graph) {
    return graph.capture_id == capture.id && !graph.dropped->load();
  });
  if (known != graphs_.end()) return *known;
  auto dropped = std::make_shared<std::atomic<bool>>(false);
  auto held = std::make_unique<std::shared_ptr<std::atomic<bool>>>(dropped);
  const auto mark_dropped = [](void* held) {
    const std::unique_ptr<std::shared_ptr<std::atomic<bool>>> owner(
        static_cast<std::shared_ptr<std::atomic<bool>>*>(held));
    (*owner)->store(true);
  };
  cudaUserObject_t object = nullptr;
  SGL_CUDA_CHECK(op, cudaUserObjectCreate(&object, held.get(), mark_dropped, 1, cudaUserObjectNoDestructorSync));
  held.release();
  if (const cudaError_t error = cudaGraphRetainUserObject(capture.graph, object, 1, cudaGraphUserObjectMove);
      error != cudaSuccess) {
    cudaUserObjectRelease(object, 1);
    SGL_CUDA_CHECK(op, error);
  }
  graphs_.push_back({capture.id, std::move(dropped), {}, {}});
  return graphs_.back();
}

const device::PullEntry* GraphInputs::note(const char* op, const Capture& capture, const void* input, int64_t bytes,
                                           int32_t dtype) {
  SGL_CHECK(!free_entries_.empty(), op, ": got more captured calls than the ", kMaxEntries,
            " that a communicator can hold; expected some graphs to have been dropped");
  Noted noted{free_entries_.back(), capture.id, {}};
  InputHandle& handle = noted.handle;
  handle.bytes = bytes;
  handle.dtype = dtype;
  handle.state = input == nullptr ? InputHandle::kStaged : InputHandle::kShared;
  if (input != nullptr) {
    SGL_CHECK(attribute_of(input, CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, handle.base) &&
                  attribute_of(input, CU_POINTER_ATTRIBUTE_BUFFER_ID, handle.buffer_id),
              op, ": the driver does not know the input's memory");
    handle.offset = static_cast<int64_t>(reinterpret_cast<uint64_t>(input) - handle.base);
  }
  graph_of(op, capture).entries.push_back(noted.entry);
  free_entries_.pop_back();
  noted_.push_back(noted);
  return table_ + noted_.back().entry;
}

std::string GraphInputs::fill_in(const std::vector<InputHandle>& handles) {
  const std::vector<Noted> noted = std::move(noted_);
  noted_.clear();
  const size_t count = noted.size();
  if (handles.size() != count * world_) return "the ranks captured different numbers of calls";
  if (count == 0) return "";
  const DeviceScope scope(device_);
  const RelaxedCapture relaxed;
  std::vector<device::PullEntry> entries(count);
  for (size_t call = 0; call < count; ++call) {
    const auto graph = std::find_if(graphs_.begin(), graphs_.end(),
                                    [&](const Graph& each) { return each.capture_id == noted[call].capture_id; });
    for (int r = 0; r < world_; ++r) {
      const InputHandle& handle = handles[r * count + call];
      const std::string which = "captured call " + std::to_string(call) + " of rank " + std::to_string(r);
      if (handle.bytes != noted[call].handle.bytes || handle.dtype != noted[call].handle.dtype) {
        return which + " has " + std::to_string(handle.bytes) + " bytes, rank " + std::to_string(rank_) + "'s has " +
               std::to_string(noted[call].handle.bytes) + ", or another dtype";
      }
      if (handle.state == InputHandle::kStaged) {
        entries[call].input[r] = group_->view().workspace[r] + staging_offset_;
        continue;
      }
      if (handle.state == InputHandle::kFreed) continue;  // its graph was dropped: a replay here would fail softly
      if (handle.state == InputHandle::kRefused) return which + " reads memory that the driver does not share";
      const uint8_t* base = nullptr;
      if (group_->same_process(r)) {
        base = reinterpret_cast<const uint8_t*>(handle.base);
      } else {
        const Base key{r, handle.base, handle.buffer_id};
        void* const mapped = open(key, handle);
        if (mapped == nullptr) return which + " reads memory that cannot be opened here";
        base = static_cast<const uint8_t*>(mapped);
        if (graph != graphs_.end() && std::count(graph->bases.begin(), graph->bases.end(), key) == 0) {
          graph->bases.push_back(key);
          ++mappings_[key].users;
        }
      }
      entries[call].input[r] = base + handle.offset;
    }
  }
  for (size_t call = 0; call < count; ++call) {
    SGL_CUDA_CHECK("capture", cudaMemcpy(table_ + noted[call].entry, &entries[call], sizeof entries[call],
                                         cudaMemcpyHostToDevice));
  }
  SGL_CUDA_CHECK("capture", cudaDeviceSynchronize());  // before any stream replays
  return "";
}

void* GraphInputs::open(const Base& base, const InputHandle& handle) {
  const auto known = mappings_.find(base);
  if (known != mappings_.end()) return known->second.address;
  void* address = nullptr;
  if (cudaIpcOpenMemHandle(&address, handle.ipc, cudaIpcMemLazyEnablePeerAccess) != cudaSuccess) {
    cudaGetLastError();
    return nullptr;
  }
  ++num_opened_;
  mappings_[base] = {address, 0, true};
  return address;
}

void GraphInputs::release(const Base& base) {
  const auto found = mappings_.find(base);
  if (found == mappings_.end() || --found->second.users > 0) return;
  if (found->second.opened && cudaIpcCloseMemHandle(found->second.address) != cudaSuccess) cudaGetLastError();
  ++num_closed_;
  mappings_.erase(found);
}

// Gives back what dropped graphs held: their entries, emptied; mappings that nobody uses are closed.
void GraphInputs::release_dropped() {
  const auto alive = [](const Graph& graph) { return !graph.dropped->load(); };
  const auto dropped = std::partition(graphs_.begin(), graphs_.end(), alive);
  if (dropped == graphs_.end()) return;
  SGL_CUDA_CHECK("capture", cudaDeviceSynchronize());  // their last replays have ended
  for (auto graph = dropped; graph != graphs_.end(); ++graph) {
    for (const int entry : graph->entries) {
      SGL_CUDA_CHECK("capture", cudaMemset(table_ + entry, 0, sizeof(device::PullEntry)));
      free_entries_.push_back(entry);
    }
    for (const Base& base : graph->bases) release(base);
  }
  graphs_.erase(dropped, graphs_.end());
  SGL_CUDA_CHECK("capture", cudaDeviceSynchronize());  // the entries are empty before they are noted again
}

std::vector<int64_t> GraphInputs::counts() const {
  const int64_t in_use = table_ == nullptr ? 0 : kMaxEntries - static_cast<int64_t>(free_entries_.size());
  return {static_cast<int64_t>(mappings_.size()), num_opened_, num_closed_, in_use};
}

}  // namespace sgl_comm::cuda
