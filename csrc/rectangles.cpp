// What a mask allows between runs of token ranges, document by document: cut into rectangles, and where their results go.
//
// `cut` does for many documents what attention/mask.py's `decompose` does for one, which the tests hold it to; `place` makes
// their launches and writes the moves (see csrc/rows.cpp) of what these return.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "rectangles.h"
#include "tables.h"

namespace py = pybind11;

namespace {

using namespace hdp;

enum Column { kDocument, kShape, kRowStart, kRowStop, kKeyStart, kKeyStop, kColumns };

// Rectangles [n, 6] of the mask between two runs of every document: by document, shape and row. `window` 0: none. `bounds`
// [documents + 1] say which token ranges [n, 2] are whose.
py::array_t<int64_t> cut(bool causal, int64_t window, const Rows& query_bounds, const Rows& queries, const Rows& key_bounds,
                         const Rows& keys) {
  if (query_bounds.size() != key_bounds.size()) throw std::invalid_argument("rectangles: unlike numbers of documents");
  const Mask mask{causal, window > 0 ? window : kNoWindow};
  std::vector<int64_t> table;
  Run q, k;
  std::vector<Rectangle> found;
  for (int64_t document = 0; document + 1 < query_bounds.size(); ++document) {
    q.read(query_bounds, queries, document);
    k.read(key_bounds, keys, document);
    found.clear();
    Cutter(mask, q, k, found).run();
    for (const Rectangle& r : found)
      table.insert(table.end(), {document, r.shape, r.row_start, r.row_stop, r.key_start, r.key_stop});
  }
  py::array_t<int64_t> result({static_cast<py::ssize_t>(table.size() / kColumns), static_cast<py::ssize_t>(kColumns)});
  std::copy(table.begin(), table.end(), result.mutable_data());
  return result;
}

// Where one component of a sum lies: a numbered tensor, its heads, and the row of each document's first.
struct Target {
  int64_t number, head, heads, has_dim, empty;
  Rows starts;
};

// What kernels return for rows [begin, end) of a run of queries, or of keys, is added to.
struct Sum {
  bool is_of_keys, is_fresh, is_partial;  // fresh: nothing was written there yet; partial: (out, lse)
  int64_t component;                      // of what a launch returns, the first
  Rows begins, ends;
  std::vector<Target> targets;
};

std::vector<Sum> parse(const py::list& sums, int64_t documents) {
  std::vector<Sum> parsed;
  for (const py::handle one : sums) {
    const auto& [of_keys, fresh, partial, component, begins, ends, targets] =
        one.cast<std::tuple<bool, bool, bool, int64_t, Rows, Rows, py::list>>();
    Sum& sum = parsed.emplace_back(Sum{of_keys, fresh, partial, component, begins, ends, {}});
    for (const py::handle target : targets) {
      const auto& [number, head, heads, has_dim, empty, starts] =
          target.cast<std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, Rows>>();
      sum.targets.push_back({number, head, heads, has_dim, empty, starts});
      if (starts.size() != documents) throw std::invalid_argument("rectangles: unlike numbers of documents");
    }
    if (begins.size() != documents || ends.size() != documents || sum.targets.empty() || (partial && sum.targets.size() != 2))
      throw std::invalid_argument("rectangles: no sum");
  }
  return parsed;
}

// Rows that hold something: intervals that do not touch, ascending.
class Covered {
 public:
  void clear() { parts_.clear(); }

  // Calls visit(start, stop, whether it holds something) for all parts of [start, stop).
  template <class Visit>
  void split(int64_t start, int64_t stop, const Visit& visit) const {
    auto next = first(start);
    while (start < stop) {
      if (next == parts_.end() || next->start >= stop) return visit(start, stop, false);
      if (next->start > start) visit(start, next->start, false);
      start = std::max(start, next->start);
      const int64_t end = std::min(stop, next->stop);
      visit(start, end, true);
      start = end;
      ++next;
    }
  }

  void add(int64_t start, int64_t stop) {
    auto begin = std::lower_bound(parts_.begin(), parts_.end(), start, [](Range r, int64_t s) { return r.stop < s; });
    auto end = begin;
    for (; end != parts_.end() && end->start <= stop; ++end) {
      start = std::min(start, end->start);
      stop = std::max(stop, end->stop);
    }
    if (begin == end) {
      parts_.insert(begin, {start, stop});
    } else {
      *begin = {start, stop};
      parts_.erase(begin + 1, end);
    }
  }

 private:
  std::vector<Range>::const_iterator first(int64_t start) const {
    return std::lower_bound(parts_.begin(), parts_.end(), start, [](Range r, int64_t s) { return r.stop <= s; });
  }
  std::vector<Range> parts_;
};

// Which rows of every input, [inputs, documents], a region of a document begins at, and how launches are made of rectangles.
struct Inputs {
  Rows bases;   // inputs 1 and 2 are keys and values, all others queries
  Rows turns;   // by document; rectangles of different turns share no launch
  bool packs;   // whether rectangles that lie together do
  static bool is_of_keys(int64_t input) { return input == 1 || input == 2; }
};

// The launches of one shape, in the order of their rectangles, and the moves of what they return, launch by launch.
class Launches {
 public:
  Launches(const Inputs& inputs, size_t sums) : inputs_(inputs), open_(2 * sums), spans_(2 * inputs.bases.shape(0)) {}

  // The launch of a rectangle.
  int64_t add(const int64_t* r) {
    const std::array<Range, 2> spans{{{r[kRowStart], r[kRowStop]}, {r[kKeyStart], r[kKeyStop]}}};
    const bool joins = joined(r, spans);
    if (!joins) begin();
    for (int64_t n = 0; n < inputs_.bases.shape(0); ++n) {
      const Range span = spans[Inputs::is_of_keys(n)];
      const int64_t base = inputs_.bases.at(n, r[kDocument]);
      if (!joins) spans_[2 * n].push_back(base + span.start), spans_[2 * n + 1].push_back(0);
      spans_[2 * n + 1].back() = base + span.stop;
    }
    turn_ = inputs_.turns.at(r[kDocument]);
    for (const int side : {0, 1}) {
      befores[side] = counts_[side];
      counts_[side] += spans[side].stop - spans[side].start;
      if (inputs_.packs) cuts_[side].back().push_back(static_cast<int32_t>(counts_[side]));
    }
    const int64_t rows = r[kRowStop] - r[kRowStart];
    costs_.back() += r[kShape] == kFull ? rows * (r[kKeyStop] - r[kKeyStart]) : rows * (rows + 1) / 2;
    return static_cast<int64_t>(costs_.size()) - 1;
  }
  void move(size_t sum, const Row& row) {
    if (!join(open_[sum], 0, row)) open_[sum].push_back(row);
  }

  // Nothing, or: first and last rows of each launch in every input, pairs, moves and where each launch's begin, cuts.
  py::object result() {
    if (costs_.empty()) return py::none();
    close();
    py::list spans, cuts;
    for (const auto& rows : spans_) spans.append(py::array_t<int64_t>(rows.size(), rows.data()));
    for (size_t n = 0; n < cuts_[0].size(); ++n)
      cuts.append(py::make_tuple(py::array_t<int32_t>(cuts_[0][n].size(), cuts_[0][n].data()),
                                 py::array_t<int32_t>(cuts_[1][n].size(), cuts_[1][n].data())));
    return py::make_tuple(spans, py::array_t<int64_t>(costs_.size(), costs_.data()), as_array(table_),
                          py::array_t<int64_t>(bounds_.size(), bounds_.data()), cuts);
  }

  std::array<int64_t, 2> befores{};  // what the last rectangle's launch returns before it, in rows and in keys

 private:
  bool joined(const int64_t* r, const std::array<Range, 2>& spans) const {
    if (!inputs_.packs || costs_.empty() || turn_ != inputs_.turns.at(r[kDocument])) return false;
    for (int64_t n = 0; n < inputs_.bases.shape(0); ++n)
      if (spans_[2 * n + 1].back() != inputs_.bases.at(n, r[kDocument]) + spans[Inputs::is_of_keys(n)].start) return false;
    return true;
  }
  void begin() {
    if (!costs_.empty()) close();
    costs_.push_back(0);
    counts_ = {};
    if (inputs_.packs)
      for (auto& cuts : cuts_) cuts.emplace_back(1, 0);
  }
  void close() {
    for (auto& rows : open_) {
      table_.insert(table_.end(), rows.begin(), rows.end());
      rows.clear();
    }
    bounds_.push_back(static_cast<int64_t>(table_.size()));
  }

  const Inputs& inputs_;
  std::vector<std::vector<Row>> open_;  // moves of the last launch, by component of a sum
  std::vector<std::vector<int64_t>> spans_;
  std::vector<int64_t> costs_, bounds_{0};
  std::vector<Row> table_;
  std::array<std::vector<std::vector<int32_t>>, 2> cuts_;
  std::array<int64_t, 2> counts_{};
  int64_t turn_ = 0;
};

class Placer {
 public:
  Placer(const Inputs& inputs, std::vector<Sum> sums, int64_t components)
      : sums_(std::move(sums)), components_(components), launches_(kShapes, Launches(inputs, sums_.size())) {}

  void add(const int64_t* r) {
    Launches& launches = launches_[r[kShape]];
    const int64_t launch = launches.add(r);
    const std::array<Range, 2> spans{{{r[kRowStart], r[kRowStop]}, {r[kKeyStart], r[kKeyStop]}}};
    for (size_t n = 0; n < sums_.size(); ++n) {
      const Sum& sum = sums_[n];
      const Range span = spans[sum.is_of_keys];
      const int64_t begin = sum.begins.at(r[kDocument]);
      const int64_t start = std::max(span.start, begin), stop = std::min(span.stop, sum.ends.at(r[kDocument]));
      if (start >= stop) continue;
      const auto write = [&](int64_t a, int64_t b, bool holds) {
        const int64_t from = launches.befores[sum.is_of_keys] + a - span.start;
        emit(launches, n, launch, from, a - begin, b - a, r[kDocument], holds);
      };
      if (sum.is_fresh)
        covered_[sum.is_of_keys].split(start, stop, write);
      else
        write(start, stop, true);
    }
    for (const int side : {0, 1}) covered_[side].add(spans[side].start, spans[side].stop);
  }

  // What no rectangle of a document has reached of sums that were fresh is emptied.
  void finish(int64_t document) {
    for (const Sum& sum : sums_) {
      const int64_t begin = sum.begins.at(document), end = sum.ends.at(document);
      if (!sum.is_fresh || begin >= end) continue;
      covered_[sum.is_of_keys].split(begin, end, [&](int64_t a, int64_t b, bool holds) {
        if (holds) return;
        for (const Target& target : sum.targets) {
          Row row = blank(target.empty);
          aim(row, target, target.starts.at(document) + a - begin, b - a);
          if (!join(empties_, 0, row)) empties_.push_back(row);
        }
      });
    }
    for (Covered& covered : covered_) covered.clear();
  }

  py::tuple result() {
    return py::make_tuple(launches_[0].result(), launches_[1].result(), launches_[2].result(), as_array(empties_));
  }

 private:
  static void aim(Row& row, const Target& target, int64_t at, int64_t count) {
    row[kTarget] = target.number, row[kTargetRow] = at, row[kTargetHead] = target.head;
    row[kRows] = count, row[kHeads] = target.heads, row[kHasDim] = target.has_dim;
  }

  void emit(Launches& launches, size_t number, int64_t launch, int64_t from, int64_t to, int64_t count, int64_t document,
            bool holds) {
    const Sum& sum = sums_[number];
    const int64_t source = launch * components_ + sum.component;
    const bool merges = sum.is_partial && holds;
    for (size_t c = 0; c < (merges ? 1 : sum.targets.size()); ++c) {
      Row row = blank(merges ? kMerge : holds ? kAdd : kCopy);
      aim(row, sum.targets[c], sum.targets[c].starts.at(document) + to, count);
      row[kSource] = source + static_cast<int64_t>(c), row[kSourceRow] = from;
      if (merges) {
        const Target& second = sum.targets[1];
        row[kSource2] = source + 1, row[kSource2Row] = from;
        row[kTarget2] = second.number, row[kTarget2Row] = second.starts.at(document) + to;
        row[kTarget2Head] = second.head;
      }
      launches.move(2 * number + c, row);
    }
  }

  std::vector<Sum> sums_;
  int64_t components_;
  std::vector<Launches> launches_;
  std::array<Covered, 2> covered_;  // of queries, and of keys, of one document
  std::vector<Row> empties_;
};

// Launches of rectangles, as `cut` orders them, for each shape, and a table of what must be emptied before. `chosen`
// [documents]: whose are computed. `bases` [inputs, documents], `turns` [documents]: see Inputs.
py::tuple place(const Rows& rectangles, const py::array_t<bool>& chosen, const Rows& bases, const Rows& turns, bool packs,
                const py::list& sums, int64_t components) {
  const int64_t documents = chosen.size();
  if (bases.ndim() != 2 || bases.shape(1) != documents || turns.size() != documents)
    throw std::invalid_argument("rectangles: unlike numbers of documents");
  const Inputs inputs{bases, turns, packs};
  Placer placer(inputs, parse(sums, documents), components);
  int64_t next = 0;
  for (int64_t document = 0; document < documents; ++document) {
    for (; next < rectangles.shape(0) && rectangles.at(next, kDocument) == document; ++next)
      if (chosen.at(document)) placer.add(rectangles.data(next, 0));
    if (chosen.at(document)) placer.finish(document);
  }
  if (next != rectangles.shape(0)) throw std::invalid_argument("rectangles: not by document");
  return placer.result();
}

}  // namespace

PYBIND11_MODULE(_rectangles, m) {
  m.doc() = "Masks cut into rectangles for many documents, and where the results of their kernel calls go.";
  m.def("cut", &cut, "Rectangles of a mask between two runs of token ranges of every document.");
  m.def("place", &place, "Launches of rectangles, and moves of what they return.");
}
