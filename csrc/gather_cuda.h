// The CUDA side of gather.h, torch-free.
#pragma once
#include <cuda_runtime_api.h>

#include "gather.h"

namespace sinkprune {

constexpr int kSegmentsPerLaunch = 24;  // a layer's projections and biases are eight

// Gathers `count` <= kSegmentsPerLaunch segments in one launch. `ids` are device memory, read by the kernel only.
cudaError_t launch_gather(const Segment* segments, int count, cudaStream_t stream);

}  // namespace sinkprune
