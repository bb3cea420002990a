#include "vectors.h"

#include <algorithm>
#include <cstdlib>
#include <string>

namespace sinkprune {
namespace {

Vectors choose() {
  Vectors widest = Vectors::generic;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) widest = Vectors::avx2;
  if (widest == Vectors::avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    widest = Vectors::avx512;
  }
#endif
  const char* wish = std::getenv("SINKPRUNE_CPU_ISA");
  const std::string name = wish ? wish : "";
  if (name == "generic") return Vectors::generic;
  if (name == "avx2") return std::min(widest, Vectors::avx2);
  return widest;
}

}  // namespace

Vectors vectors() {
  static const Vectors chosen = choose();
  return chosen;
}

const char* vectors_name() {
  switch (vectors()) {
    case Vectors::avx512:
      return "avx512";
    case Vectors::avx2:
      return "avx2";
    default:
      return "generic";
  }
}

}  // namespace sinkprune
