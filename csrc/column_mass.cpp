#include "column_mass.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "vectors.h"

#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace sinkprune {
namespace {

template <int W>
struct Vector {
  typedef float Floats __attribute__((vector_size(W * 4), aligned(4)));
  typedef int32_t Ints __attribute__((vector_size(W * 4), aligned(4)));
};

// 2^x to about one unit in the last place; 0 below 2^-127, +inf from 2^127.5 on, NaN for NaN.
template <int W>
ALWAYS_INLINE typename Vector<W>::Floats exp2_of(typename Vector<W>::Floats x) {
  using Floats = typename Vector<W>::Floats;
  using Ints = typename Vector<W>::Ints;
  x = x < -127.0f ? Floats{} - 127.0f : x;  // a comparison with NaN is false, so NaN stays
  x = x > 128.0f ? Floats{} + 128.0f : x;
  const Floats shifted = x + 12582912.0f;  // 1.5·2^23: rounds to an integer and leaves it in the low bits
  const Floats f = x - (shifted - 12582912.0f);
  Floats p = f * 0x1.5c08e4p-10f + 0x1.3d0c52p-7f;  // minimax on [-1/2, 1/2], relative error 7.5e-8
  p = p * f + 0x1.c6b6e4p-5f;
  p = p * f + 0x1.ebf918p-3f;
  p = p * f + 0x1.62e428p-1f;
  p = p * f + 0x1.000002p+0f;
  const Ints exponent = (reinterpret_cast<Ints>(shifted) + 127) << 23;
  return p * reinterpret_cast<Floats>(exponent);
}

// One tile: R keys by V vectors of queries. `sums` [R][W] collects each key's mass.
template <int W, int R, int V, bool Masked>
ALWAYS_INLINE void tile(const float* keys, int64_t key_stride, const float* features, int64_t dim, const float* lse,
                        float scale, const int32_t* key_block, const int32_t* query_block, float* sums) {
  using Floats = typename Vector<W>::Floats;
  using Ints = typename Vector<W>::Ints;
  Floats scores[R][V] = {};
  for (int64_t d = 0; d < dim; ++d) {
    Floats feature[V];
    for (int v = 0; v < V; ++v) feature[v] = *reinterpret_cast<const Floats*>(features + (d * V + v) * W);
    for (int r = 0; r < R; ++r) {
      const float key = keys[r * key_stride + d];
      for (int v = 0; v < V; ++v) scores[r][v] += key * feature[v];
    }
  }
  for (int r = 0; r < R; ++r) {
    Floats sum = *reinterpret_cast<Floats*>(sums + r * W);
    for (int v = 0; v < V; ++v) {
      const Floats shift = *reinterpret_cast<const Floats*>(lse + v * W);
      Floats weight = exp2_of<W>(scores[r][v] * scale - shift);
      if (Masked) {
        const Ints seen = *reinterpret_cast<const Ints*>(query_block + v * W) >= key_block[r];
        weight = seen ? weight : Floats{};
      }
      sum += weight;
    }
    *reinterpret_cast<Floats*>(sums + r * W) = sum;
  }
}

struct PanelArguments {
  const float* keys;
  int64_t key_stride, count, dim;
  const float *features, *lse;
  float scale;
  const int32_t *key_block, *query_block;
  float* sums;  // [count][W]
};

template <int W, int R, int V, bool Masked>
ALWAYS_INLINE void panel(const PanelArguments& a) {
  int64_t j = 0;
  for (; j + R <= a.count; j += R) {
    tile<W, R, V, Masked>(a.keys + j * a.key_stride, a.key_stride, a.features, a.dim, a.lse, a.scale,
                          Masked ? a.key_block + j : nullptr, a.query_block, a.sums + j * W);
  }
  for (; j < a.count; ++j) {
    tile<W, 1, V, Masked>(a.keys + j * a.key_stride, a.key_stride, a.features, a.dim, a.lse, a.scale,
                          Masked ? a.key_block + j : nullptr, a.query_block, a.sums + j * W);
  }
}

// The same code for each instruction set: the attribute lets the compiler use it, the tile shape fills its registers.
// A panel has `vectors` vectors of queries, the last of a head as few as it needs.
struct Isa {
  int width, vectors;
  void (*run)(const PanelArguments&, int vectors);
};

template <int W, int R, int V>
ALWAYS_INLINE void choose_panel(const PanelArguments& a, int vectors) {
  if constexpr (V > 1) {
    if (vectors < V) return choose_panel<W, R, V - 1>(a, vectors);
  }
  a.query_block ? panel<W, R, V, true>(a) : panel<W, R, V, false>(a);
}

void run_generic(const PanelArguments& a, int vectors) { choose_panel<4, 4, 2>(a, vectors); }
constexpr Isa kGeneric = {4, 2, &run_generic};

#if defined(__x86_64__)
__attribute__((target("avx2,fma"))) void run_avx2(const PanelArguments& a, int vectors) {
  choose_panel<8, 6, 2>(a, vectors);
}
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))) void run_avx512(const PanelArguments& a,
                                                                                       int vectors) {
  choose_panel<16, 6, 4>(a, vectors);
}
constexpr Isa kAvx2 = {8, 2, &run_avx2};
constexpr Isa kAvx512 = {16, 4, &run_avx512};
#endif

const Isa& isa() {
#if defined(__x86_64__)
  if (vectors() == Vectors::avx512) return kAvx512;
  if (vectors() == Vectors::avx2) return kAvx2;
#endif
  return kGeneric;
}

float widen(const char* p, Float dtype) {
  uint32_t bits = 0;
  if (dtype == Float::f32) {
    std::memcpy(&bits, p, 4);
  } else {
    uint16_t half = 0;
    std::memcpy(&half, p, 2);
    if (dtype == Float::bf16) {
      bits = static_cast<uint32_t>(half) << 16;
    } else {
      // Subnormals come out right because the product below is exact.
      const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16, rest = half & 0x7fff;
      if (rest >= 0x7c00) {
        bits = sign | 0x7f800000 | ((rest & 0x3ff) << 13);
      } else {
        bits = rest << 13;
        float value = 0;
        std::memcpy(&value, &bits, 4);
        value *= 0x1p112f;
        std::memcpy(&bits, &value, 4);
        bits |= sign;
      }
    }
  }
  float value = 0;
  std::memcpy(&value, &bits, 4);
  return value;
}

}  // namespace

void pack_queries(QueryPanels& panels, const Rows& queries, int64_t dim, int64_t length, int64_t first, int64_t step,
                  const float* lse, int64_t lse_stride, const bool* valid, const int32_t* block) {
  std::vector<int64_t> rows;
  for (int64_t i = first; i < length; i += step) {
    if (!std::isinf(lse[i * lse_stride]) && (!valid || valid[i])) rows.push_back(i);
  }
  const int64_t width = isa().width, widest = width * isa().vectors;
  panels.count = static_cast<int64_t>(rows.size());
  panels.lanes = (panels.count + width - 1) / width * width;
  panels.features.resize(panels.lanes * dim);
  panels.lse.resize(panels.lanes);
  panels.block.resize(block ? panels.lanes : 0);
  for (int64_t at = 0; at < panels.lanes; ++at) {
    const bool real = at < panels.count;
    const int64_t row = rows[real ? at : panels.count - 1];  // a copy of the last, weighed 0
    panels.lse[at] = real ? lse[row * lse_stride] : std::numeric_limits<float>::infinity();
    if (block) panels.block[at] = block[row];
    const int64_t start = at / widest * widest, lanes = std::min(widest, panels.lanes - start);
    float* features = panels.features.data() + start * dim + (at - start);
    const char* source = queries.data + row * queries.stride;
    if (queries.dtype == Float::f32) {
      const float* values = reinterpret_cast<const float*>(source);
      for (int64_t d = 0; d < dim; ++d) features[d * lanes] = values[d];
    } else {
      for (int64_t d = 0; d < dim; ++d) features[d * lanes] = widen(source + 2 * d, queries.dtype);
    }
  }
}

void head_column_mass(float* mass, const QueryPanels& panels, const Rows& keys, int64_t dim, int64_t count, float scale,
                      const bool* valid, const int32_t* block, std::vector<float>& scratch) {
  if (panels.count == 0) {
    std::fill(mass, mass + count, 0.0f);
    return;
  }
  const Isa& cpu = isa();
  const bool widened = keys.dtype != Float::f32;
  scratch.assign(count * cpu.width, 0.0f);
  const float* rows = reinterpret_cast<const float*>(keys.data);
  int64_t stride = keys.stride / 4;
  if (widened) {
    scratch.resize(count * (cpu.width + dim));
    float* wide = scratch.data() + count * cpu.width;
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t d = 0; d < dim; ++d) wide[j * dim + d] = widen(keys.data + j * keys.stride + 2 * d, keys.dtype);
    }
    rows = wide;
    stride = dim;
  }
  float* sums = scratch.data();
  const int64_t widest = cpu.width * cpu.vectors;
  for (int64_t start = 0; start < panels.lanes; start += widest) {
    const PanelArguments arguments{rows,
                                   stride,
                                   count,
                                   dim,
                                   panels.features.data() + start * dim,
                                   panels.lse.data() + start,
                                   scale,
                                   block,
                                   block ? panels.block.data() + start : nullptr,
                                   sums};
    cpu.run(arguments, static_cast<int>(std::min(widest, panels.lanes - start) / cpu.width));
  }
  for (int64_t j = 0; j < count; ++j) {
    float sum = 0;
    for (int w = 0; w < cpu.width; ++w) sum += sums[j * cpu.width + w];
    mass[j] = valid && !valid[j] ? 0.0f : sum / static_cast<float>(panels.count);
  }
}

}  // namespace sinkprune
