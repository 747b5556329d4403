// hdp._simulator: the discrete-event core of hdp.balance.simulator.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "simulator_run.h"

namespace py = pybind11;
using simulator::i64;

namespace {

using Array = py::array_t<i64, py::array::c_style>;
using Reals = py::array_t<double, py::array::c_style>;

// Arrays stay alive in the caller's dict while the simulation runs.
const i64* whole(const py::dict& arrays, const char* name, i64 count) {
  if (!py::isinstance<Array>(arrays[name])) {  // a converted copy would not live long enough
    throw std::invalid_argument(std::string(name) + " is no contiguous int64 array");
  }
  auto array = py::cast<Array>(arrays[name]);
  if (array.size() != count) {
    throw std::invalid_argument(std::string(name) + " has " + std::to_string(array.size()) + " entries, not " +
                                std::to_string(count));
  }
  return array.data();
}

i64 size_of(const py::dict& arrays, const char* name) { return py::cast<Array>(arrays[name]).size(); }
i64 number(const py::dict& arrays, const char* name) { return py::cast<i64>(arrays[name]); }

template <class T>
std::vector<T> copied(const py::dict& arrays, const char* name) {
  auto array = py::cast<py::array_t<T, py::array::c_style>>(arrays[name]);
  return {array.data(), array.data() + array.size()};
}

simulator::Table table(const py::dict& arrays) {
  simulator::Table made;
  made.size = number(arrays, "size");
  made.rounds = number(arrays, "rounds");
  made.area = copied<double>(arrays, "area");
  made.pieces = copied<i64>(arrays, "pieces");
  made.send_first = copied<i64>(arrays, "send_first");
  made.from = copied<i64>(arrays, "from");
  made.to = copied<i64>(arrays, "to");
  made.channel = copied<i64>(arrays, "channel");
  made.weight = copied<double>(arrays, "weight");
  made.receive_first = copied<i64>(arrays, "receive_first");
  made.received = copied<i64>(arrays, "received");
  return made;
}

simulator::Input input(const py::dict& a, const py::list& tables) {
  simulator::Input in;
  in.layers = number(a, "layers");
  in.most_rounds = number(a, "most_rounds");
  in.model_layers = number(a, "model_layers");
  in.actors = size_of(a, "stage");
  in.stages = number(a, "stages");
  in.nics = number(a, "nics");
  in.nic_share = number(a, "nic_share");
  in.stage = whole(a, "stage", in.actors);
  in.node = whole(a, "node", in.actors);
  in.nic = whole(a, "nic", in.actors);
  in.op_first = whole(a, "op_first", in.actors + 1);
  in.operations = in.op_first[in.actors];
  in.backward = whole(a, "backward", in.operations);
  in.dense = whole(a, "dense", in.operations);
  in.filler = whole(a, "filler", in.operations);
  in.after = whole(a, "after", in.operations);
  in.delay = whole(a, "delay", in.operations);
  in.copy = whole(a, "copy", in.operations);
  in.flags = whole(a, "flags", in.operations);
  in.share_first = whole(a, "share_first", in.operations + 1);
  in.share_exchange = whole(a, "share_exchange", in.share_first[in.operations]);
  in.share_member = whole(a, "share_member", in.share_first[in.operations]);
  in.exchanges = size_of(a, "kind");
  in.kind = whole(a, "kind", in.exchanges);
  in.area = whole(a, "area", in.exchanges);
  in.documents = whole(a, "documents", in.exchanges);
  in.member_first = whole(a, "member_first", in.exchanges + 1);
  in.member_actor = whole(a, "member_actor", in.member_first[in.exchanges]);
  auto unit = py::cast<Reals>(a["unit"]);
  if (unit.size() != 4 * in.exchanges) throw std::invalid_argument("unit must be float64 [exchanges, 2, 2]");
  in.unit = unit.data();
  in.latency[0] = number(a, "latency_within");
  in.latency[1] = number(a, "latency_across");
  in.leaving = number(a, "leaving");
  in.round_ticks = number(a, "round_ticks");
  in.piece_ticks = number(a, "piece_ticks");
  in.message_ticks = number(a, "message_ticks");
  in.piece_setup = number(a, "piece_setup");
  in.message_setup = number(a, "message_setup");
  in.gather = number(a, "gather");
  in.reduce = number(a, "reduce");
  in.root_gather = number(a, "root_gather");
  in.root_reduce = number(a, "root_reduce");
  in.gather_host = number(a, "gather_host");
  in.reduce_host = number(a, "reduce_host");
  in.quota_period = number(a, "quota_period");
  in.quota = number(a, "quota");
  in.blocking = number(a, "blocking") != 0;
  in.overlap = py::cast<double>(a["overlap"]);
  in.collectives_cross = number(a, "collectives_cross") != 0;
  for (const auto& entry : tables) in.tables.push_back(table(py::cast<py::dict>(entry)));
  return in;
}

Array as_array(const std::vector<i64>& values) {
  Array made(static_cast<py::ssize_t>(values.size()));
  std::copy(values.begin(), values.end(), made.mutable_data());
  return made;
}

py::dict run(const py::dict& arrays, const py::list& tables) {
  const simulator::Input in = input(arrays, tables);
  simulator::Output out;
  {
    py::gil_scoped_release release;
    out = simulator::Simulator(in).run();
  }
  py::dict result;
  result["begin"] = as_array(out.begin);
  result["end"] = as_array(out.end);
  result["busy"] = as_array(out.busy);
  result["finish"] = as_array(out.finish);
  result["nic_busy"] = as_array(out.nic_busy);
  result["events"] = out.events;
  result["messages"] = out.messages;
  return result;
}

}  // namespace

PYBIND11_MODULE(_simulator, m) {
  m.doc() = "Discrete-event core of hdp.balance.simulator: operations and exchanges in, times out. Whole ticks.";
  m.def("run", &run, py::arg("arrays"), py::arg("tables"),
        "Simulates one step. `arrays`: int64 arrays and numbers by the names of simulator::Input; `tables`: rounds of "
        "schedules other than the ring. Returns begin and end of each operation, busy and finishing time of each actor, "
        "busy time of each NIC, and how many events and messages it took.");
}
