// One fault for each tool of compute-sanitizer, so that a clean report means that the tool has looked (sanitize.py).
// Build: nvcc -o planted_faults planted_faults.cu; run: planted_faults TOOL.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>

namespace sgl_comm {  // the name that sanitize.py has some tools look for

__global__ void out_of_bounds(int* words, int count) { words[count + threadIdx.x] = 1; }

__global__ void uninitialised(const int* words, int* out) { out[threadIdx.x] = words[threadIdx.x] + 1; }

__global__ void divergent_barrier(int* out) {
  if (threadIdx.x < 16) __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void shared_race(int* out) {
  __shared__ int words[64];
  words[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = words[63 - threadIdx.x];  // no barrier between another thread's write and this read
}

}  // namespace sgl_comm

int main(int argc, char** argv) {
  const char* tool = argc > 1 ? argv[1] : "";
  constexpr int kCount = 64;
  int *words = nullptr, *out = nullptr;
  if (cudaMalloc(&words, kCount * sizeof(int)) != cudaSuccess ||
      cudaMalloc(&out, kCount * sizeof(int)) != cudaSuccess) {
    std::fprintf(stderr, "no GPU memory\n");
    return 2;
  }
  if (std::strcmp(tool, "memcheck") == 0) sgl_comm::out_of_bounds<<<1, 1>>>(words, 1 << 20);
  if (std::strcmp(tool, "initcheck") == 0) sgl_comm::uninitialised<<<1, kCount>>>(words, out);
  if (std::strcmp(tool, "synccheck") == 0) sgl_comm::divergent_barrier<<<1, 32>>>(out);
  if (std::strcmp(tool, "racecheck") == 0) sgl_comm::shared_race<<<1, kCount>>>(out);
  cudaDeviceSynchronize();
  return 0;
}
