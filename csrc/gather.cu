// A row of an output per block: each thread moves 16 bytes at a time, so a block's traffic is whole cache lines.
#include "gather_cuda.h"

namespace sinkprune {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;

// The widest load that every address of a segment is aligned to, and how many rows precede the segment's.
struct Placed {
  Segment segment;
  int32_t load;
  bool wide_store;  // rows of `out` are 16-byte aligned even where loads must be narrower
  int64_t first_row;
};

struct Launch {
  Placed placed[kSegmentsPerLaunch];
  int count;
};

template <typename T>
__device__ void copy_row(const Segment& s, const char* source, char* out) {
  const int vectors = static_cast<int>(s.width / sizeof(T));
  const T* from = reinterpret_cast<const T*>(source);
  T* to = reinterpret_cast<T*>(out);
  // All loads of a round before its stores: that many bytes are in flight together.
  for (int base = threadIdx.x; base < vectors; base += kThreads * kUnroll) {
    T held[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = base + u * kThreads;
      if (i < vectors) held[u] = source ? from[i] : T{};
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int i = base + u * kThreads;
      if (i < vectors) to[i] = held[u];
    }
  }
}

// The T at byte `at` of an output row whose columns are gathered.
template <typename T>
__device__ T load_column(const Segment& s, const char* source, int at) {
  const int piece = static_cast<int>(s.piece);
  const int p = at / piece;
  const int64_t id = s.ids[p];
  if (id < 0 || id >= s.limit) return T{};
  return *reinterpret_cast<const T*>(source + id * s.piece + (at - p * piece));
}

template <typename T>
__device__ void gather_columns(const Segment& s, const char* source, char* out, bool wide_store) {
  constexpr int kParts = 16 / sizeof(T);
  const int width = static_cast<int>(s.width);
  int done = 0;
  if (wide_store) {  // narrow loads, but one 16-byte store
    union {
      uint4 whole;
      T part[kParts];
    } held;
    done = width / 16 * 16;
    for (int at = threadIdx.x * 16; at < done; at += kThreads * 16) {
#pragma unroll
      for (int i = 0; i < kParts; ++i) held.part[i] = load_column<T>(s, source, at + i * int(sizeof(T)));
      *reinterpret_cast<uint4*>(out + at) = held.whole;
    }
  }
  for (int at = done + threadIdx.x * int(sizeof(T)); at < width; at += kThreads * int(sizeof(T))) {
    *reinterpret_cast<T*>(out + at) = load_column<T>(s, source, at);
  }
}

template <typename T>
__device__ void gather_row(const Placed& p, int64_t row) {
  const Segment& s = p.segment;
  char* out = s.out + row * s.out_stride;
  if (s.along_rows) {
    const int64_t id = s.ids[row / s.piece];
    const bool absent = id < 0 || id >= s.limit;
    copy_row<T>(s, absent ? nullptr : s.source + (id * s.piece + row % s.piece) * s.source_stride, out);
  } else {
    gather_columns<T>(s, s.source + row * s.source_stride, out, p.wide_store);
  }
}

__global__ void __launch_bounds__(kThreads) gather_kernel(const __grid_constant__ Launch launch) {
  int n = 0;
  while (n + 1 < launch.count && blockIdx.x >= launch.placed[n + 1].first_row) ++n;
  const Placed& p = launch.placed[n];
  const int64_t row = static_cast<int64_t>(blockIdx.x) - p.first_row;
  switch (p.load) {
    case 16: return gather_row<uint4>(p, row);
    case 8: return gather_row<uint2>(p, row);
    case 4: return gather_row<uint32_t>(p, row);
    case 2: return gather_row<uint16_t>(p, row);
    default: return gather_row<uint8_t>(p, row);
  }
}

int alignment(uint64_t bits) {
  for (int bytes = 16; bytes > 1; bytes /= 2) {
    if (bits % bytes == 0) return bytes;
  }
  return 1;
}

}  // namespace

cudaError_t launch_gather(const Segment* segments, int count, cudaStream_t stream) {
  if (count > kSegmentsPerLaunch) return cudaErrorInvalidValue;
  Launch launch{};
  int64_t rows = 0;
  for (int i = 0; i < count; ++i) {
    const Segment& s = segments[i];
    if (s.rows == 0 || s.width == 0) continue;
    if (s.width > INT32_MAX || s.piece > INT32_MAX) return cudaErrorInvalidValue;
    const uint64_t source = reinterpret_cast<uint64_t>(s.source), out = reinterpret_cast<uint64_t>(s.out);
    const uint64_t fixed = s.along_rows ? s.width : s.piece;
    Placed& p = launch.placed[launch.count++];
    p.segment = s;
    p.load = alignment(source | out | s.source_stride | s.out_stride | fixed);
    p.wide_store = alignment(out | s.out_stride) == 16;
    p.first_row = rows;
    rows += s.rows;
  }
  if (rows == 0) return cudaSuccess;
  if (rows > INT32_MAX) return cudaErrorInvalidValue;
  gather_kernel<<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(launch);
  return cudaGetLastError();
}

}  // namespace sinkprune
