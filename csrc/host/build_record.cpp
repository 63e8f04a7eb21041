// How the native parts were built, for ceat_fast.build_info(). No torch headers: this module loads on its own.
#include <pybind11/pybind11.h>

#include "build_record.h"

namespace py = pybind11;

PYBIND11_MODULE(_host, m) {
  m.doc() = "How the native parts of ceat_fast were built.";
  m.def(
      "build_record",
      [] {
        py::dict record;
        record["compiler"] = CEAT_COMPILER;
        record["cuda"] = CEAT_CUDA_STATUS;
        record["cuda_archs"] = CEAT_CUDA_ARCHS;
        record["torch_headers"] = CEAT_TORCH_VERSION;
        record["torch_floor"] = "2.10";
        return record;
      },
      "A dict of strings: compiler, cuda, cuda_archs, torch_headers, torch_floor.");
}
