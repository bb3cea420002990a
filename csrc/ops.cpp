// The tensor ops, registered through torch's stable ABI: one binary serves every torch from 2.11 on.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <utility>
#include <vector>

#include "bounds.h"
#include "column_mass.h"
#include "gather.h"

#ifdef SINKPRUNE_WITH_CUDA
#include "gather_cuda.h"
// Only a torch with CUDA has this symbol: weak, so that the same binary loads where torch has none.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**) __attribute__((weak));
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace sinkprune {
namespace {

constexpr int64_t kStreamBytes = 4 << 20;  // outputs beyond this do not stay in cache anyway

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
  return {t.size(0), columns, t.size(0) <= 1 || columns == 0 ? columns : t.stride(0)};
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
  const auto element = static_cast<int64_t>(source.element_size());
  Segment s{};
  s.count = ids.numel();
  s.ids = ids.const_data_ptr<int64_t>();
  s.limit = source_length / piece;
  if (out.numel() == 0) return s;  // nothing moves, and what is left may be too large to multiply
  s.source = static_cast<const char*>(source.const_data_ptr());
  s.out = static_cast<char*>(out.mutable_data_ptr());
  s.piece = along_rows ? piece : piece * element;
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
  std::vector<Extent> extents;
  segments.reserve(n);
  extents.reserve(3 * n);
  for (size_t i = 0; i < n; ++i) {
    segments.push_back(segment_of(outs[i], sources[i], ids[i], pieces[i], dims[i], i));
    extents.push_back(extent_of(outs[i], true, "gather_", "an out"));
    extents.push_back(extent_of(sources[i], false, "gather_", "a source"));
    extents.push_back(extent_of(ids[i], false, "gather_", "a list of ids"));
  }
  check_apart(std::move(extents), "gather_");
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

#ifdef SINKPRUNE_WITH_CUDA
// The ids are trusted, because reading them would wait for the device: the kernel writes zeros for one out of range.
void gather_cuda(std::vector<Tensor> outs, std::vector<Tensor> sources, std::vector<Tensor> ids,
                 std::vector<int64_t> pieces, std::vector<int64_t> dims) {
  const std::vector<Segment> segments = segments_of(outs, sources, ids, pieces, dims);
  for (const Tensor& out : outs) {
    STD_TORCH_CHECK(out.device() == outs[0].device(), "gather_: every out must be on one device");
  }
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "gather_: this torch has no CUDA");
  const torch::stable::accelerator::DeviceGuard guard(outs[0].get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(outs[0].get_device_index(), &stream));
  for (size_t i = 0; i < segments.size(); i += kSegmentsPerLaunch) {
    const int count = static_cast<int>(std::min<size_t>(kSegmentsPerLaunch, segments.size() - i));
    const cudaError_t error = launch_gather(segments.data() + i, count, static_cast<cudaStream_t>(stream));
    STD_TORCH_CHECK(error == cudaSuccess, "gather_: ", cudaGetErrorString(error));
  }
}
#endif

Float float_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return Float::f32;
    case ScalarType::Half:
      return Float::f16;
    case ScalarType::BFloat16:
      return Float::bf16;
    default:
      STD_TORCH_CHECK(false, "column_mass_: ", name, " must be float32, float16 or bfloat16");
  }
}

// Rows of head h of sample b of a [B, H, L, D] tensor.
Rows rows_of(const Tensor& t, Float dtype, int64_t b, int64_t h) {
  const auto size = static_cast<int64_t>(t.element_size());
  const char* data = static_cast<const char*>(t.const_data_ptr());
  return {data + (b * t.stride(0) + h * t.stride(1)) * size, t.stride(2) * size, dtype};
}

void check_per_sample(const std::optional<Tensor>& t, const char* name, ScalarType dtype, int64_t batch, int64_t length) {
  if (!t) return;
  STD_TORCH_CHECK(t->scalar_type() == dtype && t->dim() == 2 && t->size(0) == batch && t->size(1) == length &&
                      t->is_contiguous() && t->is_cpu(),
                  "column_mass_: ", name, " must be contiguous, of the op's dtype and of shape [", batch, ", ", length,
                  "]");
}

template <typename T>
const T* sample_of(const std::optional<Tensor>& t, int64_t b) {
  return t ? t->const_data_ptr<T>() + b * t->size(1) : nullptr;
}

struct MassArguments {
  const Tensor &out, &q, &k, &lse, &heads, &kv_heads;
  const std::optional<Tensor>&key_valid, &query_valid, &query_block, &key_block;
};

void check_dtypes_and_shapes(const MassArguments& a) {
  const auto& [out, q, k, lse, heads, kv_heads, key_valid, query_valid, query_block, key_block] = a;
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && lse.dim() == 3 && out.dim() == 3,
                  "column_mass_: q and k must have 4 dimensions, lse and out 3");
  const int64_t batch = q.size(0), num_heads = q.size(1), queries = q.size(2), dim = q.size(3), keys = k.size(2);
  STD_TORCH_CHECK(float_of(q, "q") == float_of(k, "k"), "column_mass_: q and k must have one dtype");
  STD_TORCH_CHECK(k.size(0) == batch && k.size(3) == dim && dim >= 1,
                  "column_mass_: q and k must agree in batch and head size, which is at least 1");
  STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Float && lse.size(0) == batch && lse.size(1) == num_heads &&
                      lse.size(2) == queries,
                  "column_mass_: lse must be float32 [B, Hq, Lq]");
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::Float && out.size(0) == batch && out.size(1) == num_heads &&
                      out.size(2) >= keys,
                  "column_mass_: out must be float32 [B, Hq, at least Lk]");
  STD_TORCH_CHECK(q.is_cpu() && k.is_cpu() && lse.is_cpu() && out.is_cpu() && heads.is_cpu() && kv_heads.is_cpu(),
                  "column_mass_: every tensor must be on the CPU");
  for (const Tensor* ids : {&heads, &kv_heads}) {
    STD_TORCH_CHECK(ids->scalar_type() == ScalarType::Long && ids->dim() == 1 && ids->is_contiguous(),
                    "column_mass_: heads and kv_heads must be contiguous int64 vectors");
  }
  STD_TORCH_CHECK(heads.numel() == kv_heads.numel(), "column_mass_: heads and kv_heads must have one length");
  check_per_sample(key_valid, "key_valid", ScalarType::Bool, batch, keys);
  check_per_sample(query_valid, "query_valid", ScalarType::Bool, batch, queries);
  check_per_sample(query_block, "query_block", ScalarType::Int, batch, queries);
  check_per_sample(key_block, "key_block", ScalarType::Int, batch, keys);
  STD_TORCH_CHECK(query_block.has_value() == key_block.has_value(),
                  "column_mass_: query_block and key_block go together");
}

// Rows that overlap would let a tensor of a few bytes ask for any amount of packed rows, or of work.
void check_memory(const MassArguments& a) {
  for (const Tensor* t : {&a.q, &a.k}) {
    STD_TORCH_CHECK((t->size(3) <= 1 || t->stride(3) == 1) && (t->size(2) <= 1 || t->stride(2) >= t->size(3)),
                    "column_mass_: q and k must have a contiguous last dimension and rows that do not overlap");
  }
  const Tensor& out = a.out;
  std::vector<Extent> extents{extent_of(out, true, "column_mass_", "out")};
  const std::pair<const Tensor*, const char*> inputs[] = {
      {&a.q, "q"}, {&a.k, "k"}, {&a.lse, "lse"}, {&a.heads, "heads"}, {&a.kv_heads, "kv_heads"}};
  for (const auto& [t, name] : inputs) extents.push_back(extent_of(*t, false, "column_mass_", name));
  for (const std::optional<Tensor>* t : {&a.key_valid, &a.query_valid, &a.query_block, &a.key_block}) {
    if (*t) extents.push_back(extent_of(**t, false, "column_mass_", "a mask"));
  }
  if (out.numel() > 0) {
    const int64_t width = out.size(2);
    int64_t inner = 1, outer = 0;  // heads within samples, or samples within heads
    if (out.stride(1) > out.stride(0)) std::swap(inner, outer);
    const bool inner_apart = out.size(inner) <= 1 || out.stride(inner) >= width;
    const int64_t reach = out.size(inner) <= 1 ? width : out.stride(inner) * (out.size(inner) - 1) + width;
    const bool outer_apart = out.size(outer) <= 1 || out.stride(outer) >= reach;
    STD_TORCH_CHECK((width <= 1 || out.stride(2) == 1) && inner_apart && outer_apart,
                    "column_mass_: out must have a contiguous last dimension and rows that do not overlap");
  }
  check_apart(std::move(extents), "column_mass_");
}

void check_ids(const MassArguments& a) {
  const int64_t num_heads = a.q.size(1), kv_count = a.k.size(1);
  const int64_t *head = a.heads.const_data_ptr<int64_t>(), *kv_head = a.kv_heads.const_data_ptr<int64_t>();
  for (int64_t n = 0; n < a.heads.numel(); ++n) {
    STD_TORCH_CHECK(head[n] >= 0 && head[n] < num_heads && (n == 0 || head[n] > head[n - 1]),
                    "column_mass_: heads must be sorted, unique and below ", num_heads);
    STD_TORCH_CHECK(kv_head[n] >= 0 && kv_head[n] < kv_count, "column_mass_: kv_heads must be below ", kv_count);
  }
}

constexpr int64_t kKeysAtOnce = 1024;  // sums and widened keys of one call stay in the L2 cache

void column_mass_cpu(Tensor out, const Tensor& q, const Tensor& k, const Tensor& lse, const Tensor& heads,
                     const Tensor& kv_heads, std::optional<Tensor> key_valid, std::optional<Tensor> query_valid,
                     std::optional<Tensor> query_block, std::optional<Tensor> key_block, double scale, int64_t first,
                     int64_t step) {
  const MassArguments arguments{out, q, k, lse, heads, kv_heads, key_valid, query_valid, query_block, key_block};
  check_dtypes_and_shapes(arguments);
  check_memory(arguments);
  check_ids(arguments);
  STD_TORCH_CHECK(first >= 0 && step >= 1, "column_mass_: first must be >= 0 and step >= 1");
  if (out.numel() == 0) return;

  const int64_t batch = q.size(0), num_heads = q.size(1), queries = q.size(2), dim = q.size(3), keys = k.size(2);
  const Float dtype = float_of(q, "q");
  const int64_t kept = heads.numel();
  const int64_t *head = heads.const_data_ptr<int64_t>(), *kv_head = kv_heads.const_data_ptr<int64_t>();
  step = std::min(step, std::max<int64_t>(1, queries));  // so that stepping past the end can't overflow
  const int64_t width = out.size(2);
  float* mass = out.mutable_data_ptr<float>();
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t h = 0; h < num_heads; ++h) {
      float* row = mass + b * out.stride(0) + h * out.stride(1);
      std::fill(row, row + width, 0.0f);
    }
  }
  if (keys == 0) return;

  // Few heads: their keys are split too, so that every thread has work; the sums do not depend on the split.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t wanted = (2 * threads + batch * kept - 1) / std::max<int64_t>(1, batch * kept);
  const int64_t at_once = std::clamp<int64_t>((keys + wanted - 1) / wanted, std::min<int64_t>(keys, 64), kKeysAtOnce);
  const int64_t chunks = (keys + at_once - 1) / at_once;
  torch::stable::parallel_for(0, batch * kept * chunks, 1, [&](int64_t begin, int64_t end) {
    QueryPanels panels;
    std::vector<float> scratch;
    int64_t packed = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / chunks / kept, n = task / chunks % kept, start = task % chunks * at_once;
      if (packed != task / chunks) {
        packed = task / chunks;
        const float* shift = lse.const_data_ptr<float>() + b * lse.stride(0) + head[n] * lse.stride(1);
        pack_queries(panels, rows_of(q, dtype, b, head[n]), dim, queries, first, step, shift, lse.stride(2),
                     sample_of<bool>(query_valid, b), sample_of<int32_t>(query_block, b));
      }
      Rows rows = rows_of(k, dtype, b, kv_head[n]);
      rows.data += start * rows.stride;
      const bool* valid = sample_of<bool>(key_valid, b);
      const int32_t* block = sample_of<int32_t>(key_block, b);
      head_column_mass(mass + b * out.stride(0) + head[n] * out.stride(1) + start, panels, rows, dim,
                       std::min(at_once, keys - start), static_cast<float>(scale * 1.4426950408889634),
                       valid ? valid + start : nullptr, block ? block + start : nullptr, scratch);
    }
  });
}

}  // namespace
}  // namespace sinkprune

STABLE_TORCH_LIBRARY(sinkprune_native, m) {
  m.def("gather_(Tensor(a!)[] outs, Tensor[] sources, Tensor[] ids, int[] pieces, int[] dims) -> ()");
  m.def(
      "column_mass_(Tensor(a!) out, Tensor q, Tensor k, Tensor lse, Tensor heads, Tensor kv_heads, Tensor? key_valid, "
      "Tensor? query_valid, Tensor? query_block, Tensor? key_block, float scale, int first, int step) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(sinkprune_native, CPU, m) {
  m.impl("gather_", TORCH_BOX(&sinkprune::gather_cpu));
  m.impl("column_mass_", TORCH_BOX(&sinkprune::column_mass_cpu));
}

#ifdef SINKPRUNE_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(sinkprune_native, CUDA, m) { m.impl("gather_", TORCH_BOX(&sinkprune::gather_cuda)); }
#endif
