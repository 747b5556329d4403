// hdp._planner: the search of the planner `auto`.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "planner_slot.h"
#include "planner_step.h"

namespace py = pybind11;
using planner::i64;

namespace {

using Array = py::array_t<i64, py::array::c_style>;

// Terms of all sequences, longest first: rows length, smallest group, linear, attention forward and backward, ring within
// a node forward and backward, ring across nodes forward and backward, handling of the ring's bytes forward and backward.
constexpr int kRows = 11;

planner::Sequences sequences(const Array& terms, const planner::Machine& machine) {
  if (terms.ndim() != 2 || terms.shape(0) != kRows) {
    throw std::invalid_argument("terms must be an int64 array of 11 rows, one column a sequence");
  }
  planner::Sequences seq;
  seq.count = static_cast<int>(terms.shape(1));
  const i64* rows[kRows];
  for (int i = 0; i < kRows; ++i) rows[i] = terms.data() + i * terms.shape(1);
  seq.length = rows[0];
  seq.smallest = rows[1];
  seq.linear = rows[2];
  for (int phase = 0; phase < 2; ++phase) {
    seq.attention[phase] = rows[3 + phase];
    seq.ring[0][phase] = rows[5 + phase];
    seq.ring[1][phase] = rows[7 + phase];
    seq.handling[phase] = rows[9 + phase];
  }
  seq.finish(machine);
  return seq;
}

py::tuple solve(const Array& terms, int world, int node, i64 capacity, i64 latency_within, i64 latency_across,
                const std::tuple<i64, i64, i64>& host, i64 constant, const std::string& regime, int effort) {
  if (world < 1 || node < 1 || capacity < 1) throw std::invalid_argument("world, node and capacity must be at least 1");
  planner::Machine machine(world, node, capacity, latency_within, latency_across);
  std::tie(machine.tile, machine.message, machine.round) = host;
  const planner::Sequences seq = sequences(terms, machine);
  planner::Assignment plan;
  {
    py::gil_scoped_release release;
    plan = regime == "slot" ? planner::plan_slot(machine, seq, constant, effort) : planner::plan_step(machine, seq, effort);
  }
  Array offsets(seq.count + 1), slots(seq.count);
  const planner::Groups& groups = plan.groups;
  i64* offset = offsets.mutable_data();
  std::fill(offset, offset + seq.count + 1, i64{0});
  for (std::size_t i = 0; i < groups.size(); ++i) {
    offset[groups.sequences[i] + 1] = groups.offsets[i + 1] - groups.offsets[i];
  }
  std::partial_sum(offset, offset + seq.count + 1, offset);
  std::copy(plan.slots.begin(), plan.slots.end(), slots.mutable_data());
  Array ranks(static_cast<py::ssize_t>(groups.ranks.size()));
  for (std::size_t i = 0; i < groups.size(); ++i) {
    std::copy(groups.ranks.begin() + groups.offsets[i], groups.ranks.begin() + groups.offsets[i + 1],
              ranks.mutable_data() + offset[groups.sequences[i]]);
  }
  return py::make_tuple(slots, offsets, ranks, plan.makespan);
}

}  // namespace

PYBIND11_MODULE(_planner, m) {
  m.doc() = "Search of the planner auto: terms of sequences in, slots and groups out. Integers throughout.";
  m.def("solve", &solve, py::arg("terms"), py::arg("world"), py::arg("node"), py::arg("capacity"),
        py::arg("latency_within"), py::arg("latency_across"), py::arg("host"), py::arg("constant"), py::arg("regime"), py::arg("effort"),
        "Slots [sequences], group offsets [sequences + 1], group ranks and the makespan in ticks. `terms`: int64 [11, "
        "sequences], longest first; `host`: ticks of a tile, a message and a round in one pass.");
}
