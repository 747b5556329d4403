// Cuts a mask between two runs of token ranges into rectangles that kernels know: see attention/mask.py, whose functions have
// the same names.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "tables.h"

namespace hdp {

enum Shape : int64_t { kCausal, kFull, kAnticausal };  // in the order in which a document's rectangles are computed
inline constexpr int kShapes = 3;

struct Range {
  int64_t start, stop;
  bool empty() const { return start >= stop; }
};

struct Rectangle {
  int64_t row_start, row_stop, key_start, key_stop;
  Shape shape;
};

inline constexpr int64_t kNoWindow = std::numeric_limits<int32_t>::max();

struct Mask {
  bool causal;
  int64_t reach;  // tokens that a query sees, its own included

  bool has_window() const { return reach != kNoWindow; }
  // Keys that a query sees in an unbounded sequence.
  Range visible(int64_t query) const { return {query - reach + 1, causal ? query + 1 : query + reach}; }
  bool sees_any(Range q, Range k) const {
    return !q.empty() && !k.empty() && visible(q.start).start < k.stop && k.start < visible(q.stop - 1).stop;
  }
  bool sees_all(Range q, Range k) const {
    return visible(q.stop - 1).start <= k.start && k.stop <= visible(q.start).stop;
  }
};

// Ranges of one document, none empty, that do not touch, and the packed row at which each begins.
struct Run {
  std::vector<Range> ranges;
  std::vector<int64_t> rows;

  void read(const Rows& bounds, const Rows& all, int64_t document) {
    ranges.clear();
    rows.assign(1, 0);
    for (int64_t n = bounds.at(document); n < bounds.at(document + 1); ++n) {
      const Range next{all.at(n, 0), all.at(n, 1)};
      if (next.empty()) continue;
      if (!ranges.empty() && next.start < ranges.back().stop)
        throw std::invalid_argument("rectangles: token ranges do not ascend");
      if (!ranges.empty() && next.start == ranges.back().stop) {
        ranges.back().stop = next.stop;
        rows.back() += next.stop - next.start;
      } else {
        ranges.push_back(next);
        rows.push_back(rows.back() + next.stop - next.start);
      }
    }
  }
  Range span(size_t first, size_t last) const { return {ranges[first].start, ranges[last - 1].stop}; }
};

// Cuts the mask of one document.
class Cutter {
 public:
  Cutter(const Mask& mask, const Run& queries, const Run& keys, std::vector<Rectangle>& found)
      : mask_(mask), q_(queries), k_(keys), found_(found) {}

  void run() {
    if (q_.ranges.empty() || k_.ranges.empty()) return;
    cut_runs(0, q_.ranges.size(), 0, k_.ranges.size());
    coalesce();
  }

 private:
  void add(Shape shape, int64_t row_start, int64_t row_stop, int64_t key_start, int64_t key_stop) {
    found_.push_back({row_start, row_stop, key_start, key_stop, shape});
  }

  bool is_same(size_t q0, size_t q1, size_t k0, size_t k1) const {
    if (q1 - q0 != k1 - k0) return false;
    for (size_t n = 0; n < q1 - q0; ++n) {
      const Range &q = q_.ranges[q0 + n], &k = k_.ranges[k0 + n];
      if (q.start != k.start || q.stop != k.stop) return false;
    }
    return true;
  }

  void cut_runs(size_t q0, size_t q1, size_t k0, size_t k1) {
    const Range q = q_.span(q0, q1), k = k_.span(k0, k1);
    if (!mask_.sees_any(q, k)) return;
    if (mask_.sees_all(q, k)) {
      add(kFull, q_.rows[q0], q_.rows[q1], k_.rows[k0], k_.rows[k1]);
    } else if (mask_.causal && !mask_.has_window() && is_same(q0, q1, k0, k1)) {
      // The same positions in the same order: causal in packed rows as well.
      add(kCausal, q_.rows[q0], q_.rows[q1], k_.rows[k0], k_.rows[k1]);
    } else if (q1 - q0 == 1 && k1 - k0 == 1) {
      const size_t before = found_.size();
      cut_ranges(q, k);
      for (size_t n = before; n < found_.size(); ++n) {
        Rectangle& r = found_[n];
        r.row_start += q_.rows[q0] - q.start, r.row_stop += q_.rows[q0] - q.start;
        r.key_start += k_.rows[k0] - k.start, r.key_stop += k_.rows[k0] - k.start;
      }
    } else if (q1 - q0 > k1 - k0) {
      const size_t middle = q0 + (q1 - q0) / 2;
      cut_runs(q0, middle, k0, k1);
      cut_runs(middle, q1, k0, k1);
    } else {
      const size_t middle = k0 + (k1 - k0) / 2;
      cut_runs(q0, q1, k0, middle);
      cut_runs(q0, q1, middle, k1);
    }
  }

  // Bands of at most `reach` rows: one ANTICAUSAL edge, a FULL middle, one CAUSAL edge.
  void cut_ranges(Range q, Range k) {
    const int64_t reach = mask_.has_window() ? mask_.reach : std::max<int64_t>(q.stop - k.start, 1);
    const int64_t block = std::min(reach, q.stop - q.start);
    for (int64_t start = q.start; start < q.stop; start += block) {
      const Range band{start, std::min(start + block, q.stop)};
      if (mask_.sees_any(band, k)) cut_band(band, k, reach);
    }
  }

  void cut_band(Range q, Range k, int64_t reach) {
    const int64_t rows = q.stop - q.start, lower = q.start - reach + 1, edge = std::min(rows, reach - 1);
    clip_square(kAnticausal, q.start, lower, edge, k);
    const int64_t upper = mask_.causal ? q.start : q.start + reach - 1;
    clip_full(q, {lower + edge, upper}, k);
    clip_square(kCausal, q.start, upper, rows, k);
  }

  void clip_full(Range q, Range keys, Range k) {
    const int64_t start = std::max(keys.start, k.start), stop = std::min(keys.stop, k.stop);
    if (start < stop && !q.empty()) add(kFull, q.start, q.stop, start, stop);
  }

  void clip_square(Shape shape, int64_t row, int64_t key, int64_t size, Range k) {
    const int64_t low = std::max<int64_t>(k.start - key, 0), high = std::max<int64_t>(key + size - k.stop, 0);
    const int64_t rest = size - low - high;
    if (rest <= 0) return;
    if (shape == kCausal)
      clip_full({row + size - high, row + size}, {key + low, key + size - high}, k);
    else
      clip_full({row, row + low}, {key + low, key + size - high}, k);
    add(shape, row + low, row + low + rest, key + low, key + low + rest);
  }

  static bool touch(const Rectangle& a, const Rectangle& b, bool by_rows) {
    if (a.shape != kFull || b.shape != kFull) return false;
    if (by_rows) return a.key_start == b.key_start && a.key_stop == b.key_stop && a.row_stop == b.row_start;
    return a.row_start == b.row_start && a.row_stop == b.row_stop && a.key_stop == b.key_start;
  }

  // Joins FULL rectangles that touch along a whole side.
  void coalesce() {
    for (bool merged = true; merged;) {
      merged = false;
      for (const bool by_rows : {true, false}) {
        std::sort(found_.begin(), found_.end(), [&](const Rectangle& a, const Rectangle& b) {
          const auto side = [&](const Rectangle& r) {
            return by_rows ? std::tuple(r.shape != kFull, r.key_start, r.key_stop, r.row_start)
                           : std::tuple(r.shape != kFull, r.row_start, r.row_stop, r.key_start);
          };
          return side(a) < side(b);
        });
        size_t count = 0;
        for (const Rectangle& r : found_) {
          if (count && touch(found_[count - 1], r, by_rows)) {
            found_[count - 1].row_stop = r.row_stop;
            found_[count - 1].key_stop = r.key_stop;
            merged = true;
          } else {
            found_[count++] = r;
          }
        }
        found_.resize(count);
      }
    }
    std::sort(found_.begin(), found_.end(), [](const Rectangle& a, const Rectangle& b) {
      return std::tuple(a.shape, a.row_start, a.key_start) < std::tuple(b.shape, b.row_start, b.key_start);
    });
  }

  const Mask& mask_;
  const Run &q_, &k_;
  std::vector<Rectangle>& found_;
};

}  // namespace hdp
