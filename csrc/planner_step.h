// Regime step: ranks run freely and meet at the end. Fill a board up to a target, order what each rank got, raise the
// target until the board holds.
#pragma once

#include <set>

#include "planner_board.h"
#include "planner_level.h"

namespace planner {

// Slots and the makespan of an assignment: shared sequences in the order given, each when its last sharer is ready; whole
// sequences fill the time that a sharer would wait, and the rest follows.
class Ordering {
 public:
  Ordering(const Machine& machine, const Sequences& seq, Assignment& plan)
      : machine_(machine), seq_(seq), plan_(plan), ready_(machine.world, 0), next_(machine.world, 0),
        last_(machine.world, -1), whole_(machine.world) {}

  // `in_order_from`: sequences of `shared` from there on run after all whole sequences of their ranks that are longer.
  void run(const std::vector<int>& shared, std::size_t in_order_from) {
    const Groups& groups = plan_.groups;
    plan_.slots.assign(seq_.count, -1);
    for (std::size_t i = 0; i < groups.size(); ++i) {
      group_[groups.sequences[i]] = {groups.ranks.data() + groups.offsets[i], groups.ranks.data() + groups.offsets[i + 1]};
    }
    for (int d = 0; d < seq_.count; ++d) {
      if (group_[d].size() == 1) whole_[group_[d].front()].push_back(d);
    }
    for (std::size_t i = 0; i < shared.size(); ++i) {
      if (i >= in_order_from) {
        for (int r : group_[shared[i]]) pack(r, kNever, shared[i]);
      }
      if (!join(shared[i])) open(shared[i]);
    }
    level();
    for (int r = 0; r < machine_.world; ++r) pack(r, kNever, seq_.count);
    plan_.makespan = *std::max_element(ready_.begin(), ready_.end());
  }

 private:
  const Machine& machine_;
  const Sequences& seq_;
  Assignment& plan_;
  std::vector<i64> ready_, next_;
  std::vector<int> last_;  // the shared sequence that a rank ran last, if nothing followed
  std::vector<std::vector<int>> whole_;
  std::vector<Members> group_ = std::vector<Members>(seq_.count);
  std::vector<i64> held_ = std::vector<i64>(seq_.count, 0);  // tokens of the fullest member in the slot that d opened
  std::vector<int> opener_ = std::vector<int>(seq_.count, -1);

  // What a rank runs last is whole sequences, which any rank can take: the rank that ends last gives one to a rank that ends
  // early, or swaps one for a shorter one, until none can. Ends within 2^-14 of the average count as level.
  void level() {
    const auto end_of = [&](int r) {
      return std::accumulate(whole_[r].begin(), whole_[r].end(), ready_[r], [&](i64 t, int d) { return t + seq_.work[d]; });
    };
    std::set<std::pair<i64, int>> ends;
    __int128 sum = 0;
    for (int r = 0; r < machine_.world; ++r) {
      const i64 end = end_of(r);
      ends.emplace(end, r);
      sum += end;
    }
    const i64 average = static_cast<i64>(sum / machine_.world), enough = average + (average >> 14) + 1;
    for (i64 moves = 4 * i64{machine_.world} + 1024; moves > 0; --moves) {
      const auto [end, giver] = *ends.rbegin();
      if (end <= enough || whole_[giver].empty()) return;
      if (!relieve(giver, end, ends)) return;
    }
  }

  // Whether the giver ends earlier after a move or swap with one of the ranks that end first.
  bool relieve(int giver, i64 end, std::set<std::pair<i64, int>>& ends) {
    int tries = 8;
    for (auto it = ends.begin(); it != ends.end() && tries > 0; ++it, --tries) {
      const auto [early, taker] = *it;
      const i64 gap = end - early;
      if (taker == giver || gap < 2) return false;
      const auto [give, take] = best_swap(seq_, whole_[giver], whole_[taker], gap, [](int, int) { return true; });
      if (give < 0) continue;
      const i64 moved = seq_.work[give] - (take < 0 ? 0 : seq_.work[take]);
      ends.erase({end, giver});
      ends.erase({early, taker});
      ends.emplace(end - moved, giver);
      ends.emplace(early + moved, taker);
      hand(give, giver, taker);
      if (take >= 0) hand(take, taker, giver);
      return true;
    }
    return false;
  }

  void hand(int d, int from, int to) {
    erase_sorted(whole_[from], d);
    insert_sorted(whole_[to], d);
    plan_.groups.ranks[group_[d].first - plan_.groups.ranks.data()] = to;
  }

  i64 part(int d) const { return ceil_div(seq_.length[d], static_cast<i64>(group_[d].size())); }

  i64 ticks(int d) const {
    const Members g = group_[d];
    return share(machine_, seq_, d, g.size(), machine_.node_of[g.front()] != machine_.node_of[g.back()]);
  }

  // Into the slot of the sequence before it, if that has the same group and room.
  bool join(int d) {
    const Members group = group_[d];
    const int before = last_[group.front()];
    if (before < 0 || !(group_[before] == group)) return false;
    for (int r : group) {
      if (last_[r] != before) return false;
    }
    const int opener = opener_[before];
    if (held_[opener] + part(d) > machine_.capacity) return false;
    held_[opener] += part(d);
    take(d, opener, plan_.slots[opener]);
    return true;
  }

  void open(int d) {
    i64 start = 0, slot = 0;
    for (int r : group_[d]) start = std::max(start, ready_[r]);
    for (int r : group_[d]) {
      if (start > ready_[r]) pack(r, start - ready_[r], seq_.count);
      slot = std::max(slot, next_[r]);
    }
    for (int r : group_[d]) ready_[r] = start;
    held_[d] = part(d);
    take(d, d, slot);
  }

  void take(int d, int opener, i64 slot) {
    const i64 cost = ticks(d);
    plan_.slots[d] = slot;
    opener_[d] = opener;
    for (int r : group_[d]) {
      ready_[r] += cost;
      next_[r] = slot + 1;
      last_[r] = d;
    }
  }

  // Whole sequences of rank r before number `before`, longest first, as far as `gap` ticks allow: first fit into
  // micro-batches.
  void pack(int r, i64 gap, int before) {
    if (whole_[r].empty() || whole_[r].front() >= before || seq_.work[whole_[r].back()] > gap) return;
    std::vector<int> later;
    std::vector<i64> room;
    std::size_t open_from = 0;
    const i64 base = next_[r];
    for (int d : whole_[r]) {
      if (d >= before || seq_.work[d] > gap) {
        later.push_back(d);
        continue;
      }
      gap -= seq_.work[d];
      while (open_from < room.size() && room[open_from] == 0) ++open_from;
      std::size_t at = open_from;
      while (at < room.size() && room[at] < seq_.length[d]) ++at;
      if (at == room.size()) room.push_back(std::max(machine_.capacity, seq_.length[d]));
      room[at] -= seq_.length[d];
      plan_.slots[d] = base + static_cast<i64>(at);
      ready_[r] += seq_.work[d];
    }
    if (!room.empty()) last_[r] = -1;
    next_[r] += static_cast<i64>(room.size());
    whole_[r] = std::move(later);
  }
};

// No step is shorter: all work over all ranks, each sequence within the target, with what it then loses on its ring.
inline i64 step_target(const Machine& machine, const Sequences& seq) {
  i64 low = 0, high = 1;
  const auto holds = [&](i64 ticks) {
    __int128 total = 0;
    for (int d = 0; d < seq.count; ++d) {
      if (seq.work[d] <= ticks && seq.smallest[d] <= 1) {
        total += seq.work[d];
        continue;
      }
      const i64 size = machine.largest();
      i64 n = fewest(machine, seq, d, ticks, std::max<i64>(1, seq.smallest[d]), size, 0);
      int across = 0;
      if (n > size) n = fewest(machine, seq, d, ticks, std::max<i64>(size + 1, seq.smallest[d]), machine.world, 1), across = 1;
      if (n > machine.world) return false;
      total += static_cast<__int128>(n) * share(machine, seq, d, n, across);
    }
    return total <= static_cast<__int128>(ticks) * machine.world;
  };
  while (!holds(high)) low = high, high *= 2;
  while (high - low > std::max<i64>(1, high >> 12)) {
    const i64 mid = low + (high - low) / 2;
    (holds(mid) ? high : low) = mid;
  }
  return high;
}

constexpr int kPlacements = 120'000;  // sequences and ranks of all boards together, beyond the fewest boards

class StepSearch {
 public:
  StepSearch(const Machine& machine, const Sequences& seq) : machine_(machine), seq_(seq), order_(seq.count) {
    std::iota(order_.begin(), order_.end(), 0);
  }

  // All variants at the lower bound, then the best of them at targets between the bound and what it reached.
  Assignment run(int budget) {
    const i64 base = step_target(machine_, seq_);
    const i64 enough = base + base / 800;
    int variant = 0;
    const int variants = budget < kVariants * 2 ? 2 : kVariants;
    for (int v = 0; v < variants && best_.makespan > enough && budget > 0; ++v, --budget) {
      if (attempt(base, v)) variant = v;
    }
    for (i64 eighths : {4, 2, 6, 4, 1, 7, 3, 5, 4, 2, 6, 1, 7, 3, 5}) {
      if (best_.makespan <= enough || budget-- <= 0) break;
      attempt(base + (best_.makespan - base) / 8 * eighths, variant);
    }
    return std::move(best_);
  }

 private:
  static constexpr int kVariants = 6;  // bit 0: wide groups; 1: not in order; 2: aligned
  const Machine& machine_;
  const Sequences& seq_;
  std::vector<int> order_;
  Assignment best_;

  bool attempt(i64 target, int variant) {
    BoardOptions options;
    options.target = target;
    options.in_order = !(variant & 2);
    options.wide_groups = variant & 1;
    options.aligned = variant & 4;
    Assignment plan;
    Board board(machine_, seq_, options);
    board.fill(order_, plan.groups);
    const std::size_t in_order_from = options.in_order ? board.before_level : board.shared.size();
    Ordering(machine_, seq_, plan).run(board.shared, in_order_from);
    if (plan.makespan >= best_.makespan) return false;
    best_ = std::move(plan);
    return true;
  }
};

inline Assignment plan_step(const Machine& machine, const Sequences& seq, int budget) {
  if (seq.count == 0) return {{}, {}, 0};
  budget = std::clamp(kPlacements / (seq.count + machine.world), 6, budget);  // boards
  return StepSearch(machine, seq).run(budget);
}

}  // namespace planner
