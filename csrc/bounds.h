// Which bytes a tensor reaches, and that they are there: sizes and strides alone promise nothing, since a storage can
// be resized under a tensor, and an expanded tensor has any size for a few bytes.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace sinkprune {

struct Extent {
  uintptr_t begin, end;
  bool written;
};

// The bytes from the first to the last element. Refuses a tensor whose storage ends before its last element.
inline Extent extent_of(const torch::stable::Tensor& t, bool written, const char* op, const char* name) {
  if (t.numel() == 0) return {0, 0, written};
  int64_t last = 0, end = 0, stored = 0;
  bool overflow = false;
  for (int64_t d = 0; d < t.dim(); ++d) {
    int64_t step = 0;
    overflow |= __builtin_mul_overflow(t.size(d) - 1, t.stride(d), &step) || __builtin_add_overflow(last, step, &last);
  }
  const auto element = static_cast<int64_t>(t.element_size());
  overflow |= __builtin_add_overflow(last, t.storage_offset() + 1, &end) || __builtin_mul_overflow(end, element, &end);
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(t.get(), &stored));
  STD_TORCH_CHECK(!overflow && end <= stored, op, ": ", name, " reaches past the ", stored, " bytes of its storage");
  const auto start = reinterpret_cast<uintptr_t>(t.const_data_ptr());
  return {start, start + static_cast<uintptr_t>((last + 1) * element), written};
}

// Refuses what is written to share memory with anything else: indices would change after they were checked.
inline void check_apart(std::vector<Extent> extents, const char* op) {
  std::sort(extents.begin(), extents.end(), [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
  uintptr_t end = 0, end_of_written = 0;
  for (const Extent& e : extents) {
    if (e.begin == e.end) continue;
    STD_TORCH_CHECK(e.begin >= end_of_written && !(e.written && e.begin < end), op,
                    ": an output and another argument share memory");
    end = std::max(end, e.end);
    if (e.written) end_of_written = std::max(end_of_written, e.end);
  }
}

}  // namespace sinkprune
