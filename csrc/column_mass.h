// Column mass of one attention head on the CPU: how much attention each key receives, averaged over queries.
//
// Keys stay put and queries stream by. Scores exist only in registers: a tile of keys by queries is multiplied,
// shifted by the queries' log-sum-exp, raised to 2^x and added into one vector per key. No score ever reaches
// memory, and each key's sum runs over queries in one fixed order, whatever the number of threads.
// Torch-free.
#pragma once
#include <cstdint>
#include <vector>

namespace sinkprune {

enum class Float { f32, f16, bf16 };

// The queries of one head that count, repacked in panels of a few vectors: [feature][lane], a lane for a query.
struct QueryPanels {
  int64_t count = 0;            // queries that count
  int64_t lanes = 0;            // the same, rounded up to whole vectors by queries of weight 0
  std::vector<float> features;  // panel by panel: [dim][its lanes]
  std::vector<float> lse;       // [lanes], +inf for a fill-up
  std::vector<int32_t> block;   // [lanes], empty unless block-causal
};

struct Rows {
  const char* data;  // the head's first row
  int64_t stride;    // bytes between rows
  Float dtype;
};

// Queries `first`, `first + step`, … of `length` that `valid` (null: all) admits and whose `lse` is not ±inf, the mark
// of a row that saw no key.
void pack_queries(QueryPanels& panels, const Rows& queries, int64_t dim, int64_t length, int64_t first, int64_t step,
                  const float* lse, int64_t lse_stride, const bool* valid, const int32_t* block);

// mass[0..keys) = sum over queries of 2^(q·k·scale − lse), over the count; `scale` has log2(e) in it. Keys that
// `valid` (null: all) does not admit get 0. With `block`, a query sees keys of its own block and earlier ones.
// `scratch` is the caller's, so that a thread allocates once.
void head_column_mass(float* mass, const QueryPanels& panels, const Rows& keys, int64_t dim, int64_t count, float scale,
                      const bool* valid, const int32_t* block, std::vector<float>& scratch);

}  // namespace sinkprune
