// Local search over whole sequences, which any rank can take: a rank that ends last gives one away, or swaps it for a
// shorter one, until none can. Budgets count moves and ranks looked at.
#pragma once

#include <cstdlib>
#include <utility>

#include "planner_core.h"

namespace planner {

// The sequence of `from`, and the one of `to` that it is swapped for (-1: none), whose difference in work is nearest half of
// `gap`, by which `from` ends later; (-1, -1) where nothing helps. Both ascend by number, so work falls.
template <typename Allowed>
std::pair<int, int> best_swap(const Sequences& seq, const std::vector<int>& from, const std::vector<int>& to, i64 gap,
                              const Allowed& allowed) {
  std::pair<int, int> best{-1, -1};
  i64 nearest = gap - gap / 2;  // moving the whole gap helps nobody
  std::size_t t = 0;
  for (int give : from) {
    // The longest partner that still leaves half of the gap, and the one before it.
    while (t < to.size() && seq.work[give] - seq.work[to[t]] < gap / 2) ++t;
    for (std::size_t k = t > 0 ? t - 1 : 0; k <= t; ++k) {
      const int take = k < to.size() ? to[k] : -1;
      const i64 moved = seq.work[give] - (take < 0 ? 0 : seq.work[take]);
      const i64 off = std::abs(moved - gap / 2);
      if (moved > 0 && moved < gap && off < nearest && allowed(give, take)) nearest = off, best = {give, take};
    }
  }
  return best;
}

inline void erase_sorted(std::vector<int>& list, int d) { list.erase(std::lower_bound(list.begin(), list.end(), d)); }
inline void insert_sorted(std::vector<int>& list, int d) { list.insert(std::lower_bound(list.begin(), list.end(), d), d); }

// Regime slot: the slowest rank of a slot gives whole sequences to ranks that idle, in its own slot or in another, without
// making any slot longer.
class SlotLevel {
 public:
  SlotLevel(const Machine& machine, const Sequences& seq, i64 constant, Assignment& plan)
      : machine_(machine), seq_(seq), constant_(constant), plan_(plan) {}

  void run() {
    measure();
    bool moved = true;
    while (moved && looks_ > 0) {
      moved = false;
      for (int s = 0; s < slots_; ++s) {
        while (looks_ > 0 && relieve(s)) moved = true;
      }
    }
    finish();
  }

 private:
  const Machine& machine_;
  const Sequences& seq_;
  i64 constant_;
  Assignment& plan_;
  int slots_ = 0;
  i64 looks_ = 4'000'000;
  std::vector<i64> load_, tokens_, duration_;  // [slot, rank], [slot, rank], [slot]
  std::vector<std::vector<int>> whole_;        // [slot, rank]
  std::vector<std::size_t> place_;             // of each sequence's first rank in the groups

  std::size_t at(int s, int r) const { return static_cast<std::size_t>(s) * machine_.world + r; }

  // Loads as they are evaluated: sequences of one group in one slot are one packed ring.
  void measure() {
    slots_ = static_cast<int>(*std::max_element(plan_.slots.begin(), plan_.slots.end())) + 1;
    load_.assign(at(slots_, 0), 0);
    tokens_ = load_;
    whole_.resize(load_.size());
    place_.resize(seq_.count);
    const Groups& groups = plan_.groups;
    std::vector<int> shared;
    for (std::size_t i = 0; i < groups.size(); ++i) {
      const int d = groups.sequences[i];
      place_[d] = static_cast<std::size_t>(groups.offsets[i]);
      const i64 n = groups.offsets[i + 1] - groups.offsets[i];
      for (i64 m = 0; m < n; ++m) {
        tokens_[at(plan_.slots[d], groups.ranks[place_[d] + m])] += seq_.length[d] / n + (m < seq_.length[d] % n);
      }
      if (n > 1) {
        shared.push_back(static_cast<int>(i));
        continue;
      }
      load_[at(plan_.slots[d], groups.ranks[place_[d]])] += seq_.work[d];
      whole_[at(plan_.slots[d], groups.ranks[place_[d]])].push_back(d);
    }
    for (auto& list : whole_) std::sort(list.begin(), list.end());
    add_rings(shared);
    duration_.resize(slots_);
    for (int s = 0; s < slots_; ++s) duration_[s] = *std::max_element(&load_[at(s, 0)], &load_[at(s, 0)] + machine_.world);
  }

  Members members(int i) const {
    const int* ranks = plan_.groups.ranks.data();
    return {ranks + plan_.groups.offsets[i], ranks + plan_.groups.offsets[i + 1]};
  }

  void add_rings(std::vector<int>& shared) {
    const auto slot = [&](int i) { return plan_.slots[plan_.groups.sequences[i]]; };
    const auto before = [&](int a, int b) {
      if (slot(a) != slot(b)) return slot(a) < slot(b);
      const Members x = members(a), y = members(b);
      return std::lexicographical_compare(x.begin(), x.end(), y.begin(), y.end());
    };
    std::sort(shared.begin(), shared.end(), before);
    for (std::size_t i = 0; i < shared.size();) {
      const Members group = members(shared[i]);
      const int across = machine_.node_of[group.front()] != machine_.node_of[group.back()];
      const i64 s = slot(shared[i]);
      Ring ring;
      for (; i < shared.size() && slot(shared[i]) == s && members(shared[i]) == group; ++i) {
        ring.add(seq_, plan_.groups.sequences[shared[i]], across);
      }
      const i64 ticks = ring_share(machine_, static_cast<i64>(group.size()), across, ring);
      for (int r : group) load_[at(static_cast<int>(s), r)] += ticks;
    }
  }

  // One move or swap that lets the slowest rank of slot `s` end earlier.
  bool relieve(int s) {
    const i64* loads = &load_[at(s, 0)];
    looks_ -= machine_.world;
    const int giver = static_cast<int>(std::max_element(loads, loads + machine_.world) - loads);
    duration_[s] = loads[giver];
    if (whole_[at(s, giver)].empty()) return false;
    return swap_within(s, giver) || move_anywhere(s, giver);
  }

  bool swap_within(int s, int giver) {
    const i64* loads = &load_[at(s, 0)];
    looks_ -= machine_.world;
    const int taker = static_cast<int>(std::min_element(loads, loads + machine_.world) - loads);
    const auto fits = [&](int give, int take) {
      const i64 more = seq_.length[give] - (take < 0 ? 0 : seq_.length[take]);
      return tokens_[at(s, taker)] + more <= machine_.capacity && tokens_[at(s, giver)] - more <= machine_.capacity;
    };
    const i64 gap = loads[giver] - loads[taker];
    const auto [give, take] = best_swap(seq_, whole_[at(s, giver)], whole_[at(s, taker)], gap, fits);
    if (give < 0) return false;
    hand(give, s, giver, s, taker);
    if (take >= 0) hand(take, s, taker, s, giver);
    return true;
  }

  // The longest sequence that some rank has time and room for, its own slot first.
  bool move_anywhere(int s, int giver) {
    for (int d : whole_[at(s, giver)]) {
      for (int k = 0; k < slots_; ++k) {
        const int t = k == 0 ? s : k <= s ? k - 1 : k;
        const i64 latest = t == s ? duration_[t] - 1 : duration_[t];
        looks_ -= machine_.world;
        if (looks_ < 0) return false;
        for (int r = 0; r < machine_.world; ++r) {
          if (load_[at(t, r)] + seq_.work[d] > latest || tokens_[at(t, r)] + seq_.length[d] > machine_.capacity) continue;
          hand(d, s, giver, t, r);
          return true;
        }
      }
    }
    return false;
  }

  void hand(int d, int s, int from, int t, int to) {
    erase_sorted(whole_[at(s, from)], d);
    insert_sorted(whole_[at(t, to)], d);
    load_[at(s, from)] -= seq_.work[d], tokens_[at(s, from)] -= seq_.length[d];
    load_[at(t, to)] += seq_.work[d], tokens_[at(t, to)] += seq_.length[d];
    plan_.slots[d] = t;
    plan_.groups.ranks[place_[d]] = to;
  }

  // The makespan, and slots without the empty ones.
  void finish() {
    plan_.makespan = 0;
    std::vector<i64> renumbered(slots_, 0);
    i64 next = 0;
    for (int s = 0; s < slots_; ++s) {
      renumbered[s] = next;
      const i64 longest = *std::max_element(&load_[at(s, 0)], &load_[at(s, 0)] + machine_.world);
      if (longest > 0) plan_.makespan += longest + constant_, ++next;
    }
    for (i64& slot : plan_.slots) slot = renumbered[slot];
  }
};

}  // namespace planner
