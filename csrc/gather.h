// The one move everything in repacking is made of: copy chosen pieces of a matrix, side by side, into another.
// Torch-free, so that the CUDA side compiles in seconds and the CPU side can be read without knowing torch.
#pragma once
#include <cstdint>
#include <vector>

namespace sinkprune {

// One matrix to gather from. Sizes and strides are bytes along the last dimension and rows along the first.
struct Segment {
  const char* source;
  char* out;
  const int64_t* ids;     // [count]; the piece of `source` that becomes piece p of `out`, -1 for a piece of zeros
  int64_t count;          // pieces in `out`
  int64_t piece;          // size of a piece: rows when `along_rows`, else bytes
  int64_t limit;          // pieces in `source`; an id outside [0, limit) writes zeros
  int64_t rows;           // rows of `out`
  int64_t width;          // bytes in a row of `out`
  int64_t source_stride;  // bytes between rows of `source`
  int64_t out_stride;     // bytes between rows of `out`
  int32_t element;        // bytes of an element: 1, 2, 4, 8 or 16
  bool along_rows;        // pieces are groups of rows (dim 0), else of columns (dim 1)
};

// A share of the work small enough to balance threads: some rows of one segment.
struct RowRange {
  int32_t segment;
  int64_t begin, end;
};

std::vector<RowRange> split_rows(const std::vector<Segment>& segments);
void gather_rows(const Segment& segment, int64_t begin, int64_t end, bool stream);

}  // namespace sinkprune
