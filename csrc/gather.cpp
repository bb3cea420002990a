#include "gather.h"

#include <algorithm>
#include <cstring>

#include "vectors.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace sinkprune {
namespace {

constexpr int64_t kShareBytes = 512 * 1024;
constexpr int64_t kPage = 4096;

#if defined(__x86_64__)
// Writes past the cache: a packed weight is larger than any cache and is not read again soon, and a plain store would
// first read the line it overwrites. `ahead` is where the reads go next, which the hardware does not foresee across
// pages.
__attribute__((target("avx2"))) void copy_streaming(char* out, const char* source, int64_t bytes, int64_t ahead) {
  const int64_t head = std::min<int64_t>(bytes, -reinterpret_cast<uintptr_t>(out) & 31);
  std::memcpy(out, source, head);
  int64_t i = head;
  for (; i + 64 <= bytes; i += 64) {
    _mm_prefetch(source + i + ahead, _MM_HINT_NTA);
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i + 32));
    _mm256_stream_si256(reinterpret_cast<__m256i*>(out + i), low);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(out + i + 32), high);
  }
  std::memcpy(out + i, source + i, bytes - i);
}
#endif

void copy(char* out, const char* source, int64_t bytes, [[maybe_unused]] int64_t ahead, [[maybe_unused]] bool stream) {
#if defined(__x86_64__)
  if (stream && bytes >= 128) return copy_streaming(out, source, bytes, ahead);
#endif
  std::memcpy(out, source, bytes);
}

bool absent(const Segment& s, int64_t id) { return id < 0 || id >= s.limit; }

// Pieces p..end whose ids follow one another, or are all absent, move as one.
int64_t run_end(const Segment& s, int64_t p) {
  int64_t end = p + 1;
  if (absent(s, s.ids[p])) {
    while (end < s.count && absent(s, s.ids[end])) ++end;
  } else {
    while (end < s.count && s.ids[end] == s.ids[p] + (end - p) && !absent(s, s.ids[end])) ++end;
  }
  return end;
}

void gather_row_pieces(const Segment& s, int64_t begin, int64_t end, bool stream) {
  for (int64_t row = begin; row < end;) {
    const int64_t p = row / s.piece;
    const int64_t stop = std::min(end, run_end(s, p) * s.piece);
    char* out = s.out + row * s.out_stride;
    const int64_t rows = stop - row;
    if (absent(s, s.ids[p])) {
      for (int64_t r = 0; r < rows; ++r) std::memset(out + r * s.out_stride, 0, s.width);
    } else {
      const char* source = s.source + (s.ids[p] * s.piece + row % s.piece) * s.source_stride;
      if (s.source_stride == s.width && s.out_stride == s.width) {
        copy(out, source, rows * s.width, kPage, stream);
      } else {
        for (int64_t r = 0; r < rows; ++r) {
          copy(out + r * s.out_stride, source + r * s.source_stride, s.width, s.source_stride, stream);
        }
      }
    }
    row = stop;
  }
}

// Single columns, scattered: four rows at a time, so that an index is loaded once for four elements.
template <typename Element>
void gather_elements(const Segment& s, int64_t begin, int64_t end) {
  const bool holes = std::any_of(s.ids, s.ids + s.count, [&](int64_t id) { return absent(s, id); });
  auto row_of = [&](int64_t row) { return reinterpret_cast<const Element*>(s.source + row * s.source_stride); };
  auto out_of = [&](int64_t row) { return reinterpret_cast<Element*>(s.out + row * s.out_stride); };
  int64_t row = begin;
  for (; !holes && row + 4 <= end; row += 4) {
    const Element *a = row_of(row), *b = row_of(row + 1), *c = row_of(row + 2), *d = row_of(row + 3);
    Element *__restrict out_a = out_of(row), *__restrict out_b = out_of(row + 1), *__restrict out_c = out_of(row + 2),
            *__restrict out_d = out_of(row + 3);
    for (int64_t p = 0; p < s.count; ++p) {
      const int64_t id = s.ids[p];
      out_a[p] = a[id];
      out_b[p] = b[id];
      out_c[p] = c[id];
      out_d[p] = d[id];
    }
  }
  for (; row < end; ++row) {
    const Element* from = row_of(row);
    Element* __restrict to = out_of(row);
    for (int64_t p = 0; p < s.count; ++p) to[p] = absent(s, s.ids[p]) ? Element{} : from[s.ids[p]];
  }
}

void gather_column_pieces(const Segment& s, int64_t begin, int64_t end, bool stream) {
  struct Run {
    int64_t source, out, bytes;  // source < 0: zeros
  };
  std::vector<Run> runs;
  for (int64_t p = 0; p < s.count;) {
    const int64_t stop = run_end(s, p);
    runs.push_back({absent(s, s.ids[p]) ? -1 : s.ids[p] * s.piece, p * s.piece, (stop - p) * s.piece});
    p = stop;
  }
  // Scattered single channels: a call per run costs more than a plain loop over elements.
  if (s.piece == s.element && s.width < 32 * static_cast<int64_t>(runs.size())) {
    if (s.element == 1) return gather_elements<uint8_t>(s, begin, end);
    if (s.element == 2) return gather_elements<uint16_t>(s, begin, end);
    if (s.element == 4) return gather_elements<uint32_t>(s, begin, end);
    if (s.element == 8) return gather_elements<uint64_t>(s, begin, end);
  }
  for (int64_t row = begin; row < end; ++row) {
    const char* source = s.source + row * s.source_stride;
    char* out = s.out + row * s.out_stride;
    for (const Run& run : runs) {
      if (run.source < 0) {
        std::memset(out + run.out, 0, run.bytes);
      } else {
        copy(out + run.out, source + run.source, run.bytes, s.source_stride, stream);
      }
    }
  }
}

}  // namespace

std::vector<RowRange> split_rows(const std::vector<Segment>& segments) {
  std::vector<RowRange> shares;
  for (size_t i = 0; i < segments.size(); ++i) {
    const Segment& s = segments[i];
    if (s.width == 0) continue;
    const int64_t rows = std::max<int64_t>(1, kShareBytes / s.width);
    for (int64_t row = 0; row < s.rows; row += rows) {
      shares.push_back({static_cast<int32_t>(i), row, std::min(s.rows, row + rows)});
    }
  }
  return shares;
}

void gather_rows(const Segment& segment, int64_t begin, int64_t end, bool stream) {
#if defined(__x86_64__)
  stream = stream && vectors() != Vectors::generic;
#endif
  if (segment.along_rows) {
    gather_row_pieces(segment, begin, end, stream);
  } else {
    gather_column_pieces(segment, begin, end, stream);
  }
#if defined(__x86_64__)
  if (stream) _mm_sfence();
#endif
}

}  // namespace sinkprune
