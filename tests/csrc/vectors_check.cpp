// The torch-free half of csrc/ against plain loops in double precision, on whatever processor this is compiled for.
// test_vectors.py compiles it with the sources, for this machine and for others under emulation. Prints one line.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "column_mass.h"
#include "gather.h"
#include "vectors.h"

using namespace sinkprune;

namespace {

int64_t checks = 0, failures = 0;

void expect(bool holds, const std::string& what) {
  ++checks;
  if (!holds && ++failures <= 20) std::fprintf(stderr, "failed: %s\n", what.c_str());
}

struct Random {
  uint64_t state;
  uint32_t next() {
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    return static_cast<uint32_t>(state >> 33);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(next() % static_cast<uint64_t>(n)); }
  double real() { return (next() / 2147483648.0 - 0.5) * 3; }
};

// The value of a 16-bit float by its definition: sign, exponent, fraction.
double value_of(uint16_t bits, int exponent_bits) {
  const int fraction_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const double sign = bits >> 15 ? -1 : 1;
  const int exponent = (bits & 0x7fff) >> fraction_bits;
  const double fraction = std::ldexp(bits & ((1 << fraction_bits) - 1), -fraction_bits);
  if (exponent == (1 << exponent_bits) - 1) return fraction ? NAN : sign * INFINITY;
  return exponent ? sign * std::ldexp(1 + fraction, exponent - bias) : sign * std::ldexp(fraction, 1 - bias);
}

// A matrix of one dtype: its bytes, its values, and rows that lie apart.
struct Matrix {
  Float dtype;
  int64_t columns, stride;  // elements
  std::vector<char> bytes;
  std::vector<double> values;

  Matrix(Float type, int64_t rows, int64_t width, Random& random)
      : dtype(type), columns(width), stride(width + random.below(3)), values(rows * width) {
    const int64_t size = dtype == Float::f32 ? 4 : 2;
    bytes.assign(rows * stride * size, 0x7f);  // what lies between the rows is huge or NaN
    for (int64_t i = 0; i < rows * width; ++i) {
      char* at = bytes.data() + (i / width * stride + i % width) * size;
      const auto wide = static_cast<float>(random.real());
      if (dtype == Float::f32) {
        std::memcpy(at, &wide, 4);
        values[i] = wide;
        continue;
      }
      uint32_t pattern = 0;
      std::memcpy(&pattern, &wide, 4);
      uint16_t half = static_cast<uint16_t>(pattern >> 16);
      if (dtype == Float::f16) half = static_cast<uint16_t>(random.next() & 0x83ff) | (11 + random.below(5)) << 10;
      std::memcpy(at, &half, 2);
      values[i] = value_of(half, dtype == Float::f16 ? 5 : 8);
    }
  }
  Rows rows() const { return {bytes.data(), stride * (dtype == Float::f32 ? 4 : 2), dtype}; }
  double operator()(int64_t row, int64_t column) const { return values[row * columns + column]; }
};

struct Case {
  Float dtype;
  int64_t dim, queries, keys, first, step;
  bool blocks, holes;
};

std::string told(const Case& c) {
  return "column mass of dtype " + std::to_string(static_cast<int>(c.dtype)) + ", D " + std::to_string(c.dim) + ", " +
         std::to_string(c.queries) + " queries, " + std::to_string(c.keys) + " keys, every " + std::to_string(c.step) +
         (c.blocks ? ", in blocks" : "") + (c.holes ? ", with holes" : "");
}

void check_column_mass(const Case& c, Random& random) {
  const Matrix q(c.dtype, c.queries, c.dim, random), k(c.dtype, c.keys, c.dim, random);
  const float scale = 1.4426950f / std::sqrt(static_cast<float>(c.dim));
  std::vector<float> lse(c.queries);
  std::vector<char> query_valid(c.queries, 1), key_valid(c.keys, 1);
  std::vector<int32_t> query_block(c.queries), key_block(c.keys);
  for (int64_t i = 0; i < c.queries; ++i) {
    lse[i] = static_cast<float>(random.real()) + 5;
    if (c.holes && random.below(5) == 0) lse[i] = random.below(2) ? INFINITY : -INFINITY;
    if (c.holes) query_valid[i] = random.below(4) > 0;
    query_block[i] = static_cast<int32_t>(random.below(4));
  }
  for (int64_t j = 0; j < c.keys; ++j) {
    if (c.holes) key_valid[j] = random.below(4) > 0;
    key_block[j] = static_cast<int32_t>(random.below(4));
  }
  const auto* queries_that_count = reinterpret_cast<const bool*>(query_valid.data());
  QueryPanels panels;
  pack_queries(panels, q.rows(), c.dim, c.queries, c.first, c.step, lse.data(), 1,
               c.holes ? queries_that_count : nullptr, c.blocks ? query_block.data() : nullptr);
  std::vector<float> mass(c.keys + 1, -7), scratch;
  head_column_mass(mass.data(), panels, k.rows(), c.dim, c.keys, scale,
                   c.holes ? reinterpret_cast<const bool*>(key_valid.data()) : nullptr,
                   c.blocks ? key_block.data() : nullptr, scratch);
  for (int64_t j = 0; j < c.keys; ++j) {
    double sum = 0;
    int64_t counted = 0;
    for (int64_t i = c.first; i < c.queries; i += c.step) {
      if (!query_valid[i] || std::isinf(lse[i])) continue;
      ++counted;
      if (c.blocks && query_block[i] < key_block[j]) continue;
      double score = 0;
      for (int64_t d = 0; d < c.dim; ++d) score += q(i, d) * k(j, d);
      sum += std::exp2(score * scale - lse[i]);
    }
    const double expected = counted && key_valid[j] ? sum / static_cast<double>(counted) : 0;
    expect(std::abs(mass[j] - expected) <= 3e-5 * expected + 1e-9, told(c) + ", key " + std::to_string(j));
  }
  expect(mass[c.keys] == -7, told(c) + ": wrote past the last key");
}

// Mass of one query and one key of one dimension: 2^(q·k - lse).
float single(float q, const void* key, Float dtype, float lse) {
  QueryPanels panels;
  std::vector<float> scratch;
  float mass = -7;
  pack_queries(panels, {reinterpret_cast<const char*>(&q), 4, Float::f32}, 1, 1, 0, 1, &lse, 1, nullptr, nullptr);
  head_column_mass(&mass, panels, {static_cast<const char*>(key), 4, dtype}, 1, 1, 1.0f, nullptr, nullptr, scratch);
  return mass;
}

// Every kind of 16-bit number is widened to its value: scaled into [1, 2), where 2^x tells neighbours apart.
void check_widening() {
  for (const Float dtype : {Float::f16, Float::bf16}) {
    for (uint32_t bits = 0; bits < 65536; bits += 5) {
      const auto pattern = static_cast<uint16_t>(bits);
      const double value = value_of(pattern, dtype == Float::f16 ? 5 : 8);
      const std::string what = "16-bit pattern " + std::to_string(bits);
      if (std::isnan(value)) {
        expect(std::isnan(single(1, &pattern, dtype, 0)), what + ", a NaN");
      } else if (std::isinf(value)) {
        const float mass = single(1, &pattern, dtype, 0);  // +inf or NaN: lanes that only fill up give inf - inf
        expect(value > 0 ? !std::isfinite(mass) : mass == 0, what + ", infinite");
      } else if (value != 0 && std::ilogb(value) > -126 && std::ilogb(value) < 126) {
        const auto factor = static_cast<float>(std::ldexp(1, -std::ilogb(value)));
        const double expected = std::exp2(value * factor);
        expect(std::abs(single(factor, &pattern, dtype, 0) - expected) <= 3e-7 * expected, what);
      }
    }
  }
}

void check_extremes() {
  const float one = 1;
  for (float x = -126; x < 127; x += 0.37f) {
    const double expected = std::exp2(static_cast<double>(x));
    expect(std::abs(single(x, &one, Float::f32, 0) - expected) <= 3e-7 * expected, "2^" + std::to_string(x));
  }
  expect(single(-1e30f, &one, Float::f32, 0) == 0, "2^-1e30 is 0");
  expect(single(1e30f, &one, Float::f32, 0) == INFINITY, "2^1e30 is infinite");
  expect(std::isnan(single(NAN, &one, Float::f32, 0)), "NaN stays");
  expect(single(1, &one, Float::f32, -INFINITY) == 0, "a row that saw no key has no mass");
}

void check_gather(int32_t element, bool along_rows, bool stream, Random& random) {
  const int64_t piece = 1 + random.below(along_rows ? 3 : 70), limit = 1 + random.below(6), count = random.below(8);
  const int64_t other = 1 + random.below(90);
  const int64_t rows = along_rows ? count * piece : other, columns = along_rows ? other : count * piece;
  const int64_t source_rows = along_rows ? limit * piece : other, source_columns = along_rows ? other : limit * piece;
  const int64_t source_stride = (source_columns + random.below(3)) * element;
  const int64_t out_stride = (columns + random.below(3)) * element;
  std::vector<char> source(source_rows * source_stride + 1), out(rows * out_stride + 64, 0x55);
  for (char& byte : source) byte = static_cast<char>(random.next());
  std::vector<int64_t> ids(count);
  const int64_t start = random.below(limit);
  for (int64_t p = 0; p < count; ++p) ids[p] = random.below(3) ? (start + p) % limit : random.below(limit + 1) - 1;
  std::vector<char> expected = out;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t id = ids[along_rows ? r / piece : c / piece];
      char* to = expected.data() + r * out_stride + c * element;
      const int64_t from_row = along_rows ? id * piece + r % piece : r;
      const int64_t from_column = along_rows ? c : id * piece + c % piece;
      if (id < 0) {
        std::memset(to, 0, element);
      } else {
        std::memcpy(to, source.data() + from_row * source_stride + from_column * element, element);
      }
    }
  }
  const Segment segment{source.data(), out.data(), ids.data(), count, along_rows ? piece : piece * element, limit,
                        rows, columns * element, source_stride, out_stride, element, along_rows};
  for (const RowRange& share : split_rows({segment})) gather_rows(segment, share.begin, share.end, stream);
  expect(out == expected, std::string("gather of ") + (along_rows ? "rows" : "columns") + " of " +
                              std::to_string(element) + "-byte elements, " + std::to_string(count) + " pieces of " +
                              std::to_string(piece) + (stream ? ", past the cache" : ""));
}

}  // namespace

int main() {
  Random random{1};
  for (const Float dtype : {Float::f32, Float::f16, Float::bf16}) {
    for (const int64_t dim : {1, 3, 32, 80}) {
      for (const int64_t queries : {1, 5, 63, 130}) {
        for (const int64_t keys : {1, 6, 7, 41}) {
          for (const int variant : {0, 1, 2, 3}) {
            const int64_t step = 1 + random.below(3);
            check_column_mass({dtype, dim, queries, keys, random.below(step), step, variant % 2 == 1, variant > 1},
                              random);
          }
        }
      }
    }
  }
  check_widening();
  check_extremes();
  for (const int32_t element : {1, 2, 4, 8, 16}) {
    for (int repeat = 0; repeat < 200; ++repeat) check_gather(element, repeat % 2, repeat % 4 > 1, random);
  }
  std::printf("%s: %lld checks, %lld failures\n", vectors_name(), static_cast<long long>(checks),
              static_cast<long long>(failures));
  return failures ? 1 : 0;
}
