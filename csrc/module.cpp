// The Python module: importing it registers the ops of ops.cpp; what it offers itself is how it was built.
#include <pybind11/pybind11.h>

#include <string>

#include "vectors.h"

#ifndef SINKPRUNE_FLAGS
#define SINKPRUNE_FLAGS ""
#endif

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return std::string("clang ") + __clang_version__;
#elif defined(__GNUC__)
  return std::string("gcc ") + __VERSION__;
#else
  return "unknown";
#endif
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = compiler();
  info["flags"] = SINKPRUNE_FLAGS;
  info["torch_target"] = SINKPRUNE_TORCH_TARGET;
  info["vectors"] = sinkprune::vectors_name();
  info["sanitized"] = static_cast<bool>(SINKPRUNE_SANITIZED);
#ifdef SINKPRUNE_CUDA_VERSION
  info["cuda"] = SINKPRUNE_CUDA_VERSION;
  info["cuda_architectures"] = SINKPRUNE_CUDA_ARCHITECTURES;
  info["cuda_skipped"] = py::none();
#else
  info["cuda"] = py::none();
  info["cuda_architectures"] = "";
  info["cuda_skipped"] = SINKPRUNE_CUDA_SKIPPED;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native ops of sinkprune; importing this module registers torch.ops.sinkprune_native.";
  m.def("build_info", &build_info, "How this module was built: compiler, flags, torch target, CUDA version.");
}
