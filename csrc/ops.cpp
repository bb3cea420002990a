// The tensor ops, registered through torch's stable ABI: one binary serves every torch from 2.11 on.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <limits>
#include <vector>

#include "gather.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace sinkprune {
namespace {

constexpr int64_t kStreamBytes = 4 << 20;  // outputs beyond this do not stay in cache anyway

struct Extent {
  uintptr_t begin, end;
  bool overlaps(const Extent& other) const { return begin < other.end && other.begin < end; }
};

// Bytes a row-major matrix reaches; also where a size that would not fit an address is refused.
Extent extent_of(const Tensor& t, int64_t rows, int64_t columns, int64_t stride) {
  const auto start = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  if (rows == 0 || columns == 0) return {start, start};
  int64_t last = 0, bytes = 0;
  const bool overflow = __builtin_mul_overflow(rows - 1, stride, &last) ||
                        __builtin_add_overflow(last, columns, &last) ||
                        __builtin_mul_overflow(last, static_cast<int64_t>(t.element_size()), &bytes);
  STD_TORCH_CHECK(!overflow, "gather_: a matrix of ", rows, " rows of ", columns, " elements overflows 64 bits");
  return {start, start + static_cast<uintptr_t>(bytes)};
}

struct Matrix {
  int64_t rows, columns, stride;  // elements
};

// A vector is one row, so that a bias moves by the same code as the columns of a weight.
Matrix matrix_of(const Tensor& t, const char* name, size_t index) {
  STD_TORCH_CHECK(t.dim() == 1 || t.dim() == 2, "gather_: ", name, "[", index, "] must have 1 or 2 dimensions, got ",
                  t.dim());
  const int64_t columns = t.size(t.dim() - 1);
  STD_TORCH_CHECK(columns <= 1 || t.stride(t.dim() - 1) == 1, "gather_: ", name, "[", index,
                  "] must have a contiguous last dimension, got stride ", t.stride(t.dim() - 1));
  if (t.dim() == 1) return {1, columns, columns};
  return {t.size(0), columns, t.size(0) <= 1 ? columns : t.stride(0)};
}

Segment segment_of(const Tensor& out, const Tensor& source, const Tensor& ids, int64_t piece, int64_t dim, size_t n) {
  STD_TORCH_CHECK(out.scalar_type() == source.scalar_type(), "gather_: outs[", n, "] and sources[", n,
                  "] must have one dtype");
  STD_TORCH_CHECK(out.device() == source.device() && out.device() == ids.device(), "gather_: outs[", n, "], sources[",
                  n, "] and ids[", n, "] must be on one device");
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Long && ids.dim() == 1 && ids.is_contiguous(), "gather_: ids[", n,
                  "] must be a contiguous int64 vector");
  STD_TORCH_CHECK(out.dim() == source.dim(), "gather_: outs[", n, "] has ", out.dim(), " dimensions, sources[", n,
                  "] ", source.dim());
  STD_TORCH_CHECK(dim == 0 || (dim == 1 && source.dim() == 2), "gather_: dims[", n, "] is ", dim, " for a source of ",
                  source.dim(), " dimensions");
  STD_TORCH_CHECK(piece >= 1, "gather_: pieces[", n, "] must be at least 1, got ", piece);
  const Matrix from = matrix_of(source, "sources", n), to = matrix_of(out, "outs", n);
  const bool along_rows = source.dim() == 2 && dim == 0;
  const int64_t source_length = along_rows ? from.rows : from.columns;
  const int64_t out_length = along_rows ? to.rows : to.columns;
  STD_TORCH_CHECK(along_rows ? from.columns == to.columns : from.rows == to.rows, "gather_: outs[", n,
                  "] must match sources[", n, "] in the dimension that is not gathered");
  STD_TORCH_CHECK(source_length % piece == 0, "gather_: pieces of ", piece, " do not divide the ", source_length,
                  " of sources[", n, "]");
  int64_t wanted = 0;
  STD_TORCH_CHECK(!__builtin_mul_overflow(ids.numel(), piece, &wanted) && wanted == out_length, "gather_: ",
                  ids.numel(), " pieces of ", piece, " do not fill the ", out_length, " of outs[", n, "]");
  STD_TORCH_CHECK(to.rows <= 1 || to.stride >= to.columns, "gather_: the rows of outs[", n, "] overlap");
  STD_TORCH_CHECK(!extent_of(out, to.rows, to.columns, to.stride)
                       .overlaps(extent_of(source, from.rows, from.columns, from.stride)),
                  "gather_: outs[", n, "] and sources[", n, "] share memory");
  const auto element = static_cast<int64_t>(source.element_size());
  Segment s{};
  s.source = static_cast<const char*>(source.const_data_ptr());
  s.out = static_cast<char*>(out.mutable_data_ptr());
  s.ids = ids.const_data_ptr<int64_t>();
  s.count = ids.numel();
  s.piece = along_rows ? piece : piece * element;
  s.limit = source_length / piece;
  s.rows = to.rows;
  s.width = to.columns * element;
  s.source_stride = from.stride * element;
  s.out_stride = to.stride * element;
  s.element = static_cast<int32_t>(element);
  s.along_rows = along_rows;
  return s;
}

std::vector<Segment> segments_of(const std::vector<Tensor>& outs, const std::vector<Tensor>& sources,
                                 const std::vector<Tensor>& ids, const std::vector<int64_t>& pieces,
                                 const std::vector<int64_t>& dims) {
  const size_t n = outs.size();
  STD_TORCH_CHECK(sources.size() == n && ids.size() == n && pieces.size() == n && dims.size() == n,
                  "gather_: the five lists must have one length, got ", n, ", ", sources.size(), ", ", ids.size(), ", ",
                  pieces.size(), ", ", dims.size());
  std::vector<Segment> segments;
  segments.reserve(n);
  for (size_t i = 0; i < n; ++i) segments.push_back(segment_of(outs[i], sources[i], ids[i], pieces[i], dims[i], i));
  return segments;
}

void gather_cpu(std::vector<Tensor> outs, std::vector<Tensor> sources, std::vector<Tensor> ids,
                std::vector<int64_t> pieces, std::vector<int64_t> dims) {
  const std::vector<Segment> segments = segments_of(outs, sources, ids, pieces, dims);
  int64_t bytes = 0;
  for (size_t i = 0; i < segments.size(); ++i) {
    const Segment& s = segments[i];
    bytes += s.rows * s.width;
    for (int64_t p = 0; p < s.count; ++p) {
      STD_TORCH_CHECK(s.ids[p] >= -1 && s.ids[p] < s.limit, "gather_: ids[", i, "][", p, "] is ", s.ids[p],
                      ", expected -1 or one of ", s.limit, " pieces");
    }
  }
  const std::vector<RowRange> shares = split_rows(segments);
  const bool stream = bytes >= kStreamBytes;
  torch::stable::parallel_for(0, static_cast<int64_t>(shares.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      gather_rows(segments[shares[i].segment], shares[i].begin, shares[i].end, stream);
    }
  });
}

}  // namespace
}  // namespace sinkprune

STABLE_TORCH_LIBRARY(sinkprune_native, m) {
  m.def("gather_(Tensor(a!)[] outs, Tensor[] sources, Tensor[] ids, int[] pieces, int[] dims) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sinkprune_native, CPU, m) { m.impl("gather_", TORCH_BOX(&sinkprune::gather_cpu)); }
