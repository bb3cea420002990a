// Which vector instructions the CPU path uses: chosen when it runs, so one binary serves every x86-64 and others.
#pragma once

namespace sinkprune {

enum class Vectors { generic, avx2, avx512 };

// The widest this CPU has, or what SINKPRUNE_CPU_ISA names ("generic", "avx2") where that is narrower.
Vectors vectors();
const char* vectors_name();

}  // namespace sinkprune
