// Just enough CUDA for a kernel without shared memory or barriers to run on the CPU, one thread after another.
#pragma once
#include <cstdint>

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(threads)

struct Index {
  unsigned x;
};
inline Index blockIdx, threadIdx;

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
typedef void* cudaStream_t;
inline cudaError_t cudaGetLastError() { return cudaSuccess; }

template <typename Kernel, typename Argument>
void emulate(Kernel kernel, unsigned blocks, unsigned threads, const Argument& argument) {
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) kernel(argument);
  }
}
