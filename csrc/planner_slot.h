// Regime slot: every slot is a barrier, so slots are filled one at a time. A slot must hold the longest sequence left; its
// duration is chosen among a few so that the idle time it buys is the smallest part of the work it does.
#pragma once

#include "planner_board.h"

namespace planner {

class SlotSearch {
 public:
  SlotSearch(const Machine& machine, const Sequences& seq, i64 constant, int outlook)
      : machine_(machine), seq_(seq), outlook_(outlook), constant_(constant) {}

  Assignment run(int effort) {
    Assignment plan;
    plan.slots.assign(seq_.count, -1);
    plan.makespan = 0;
    std::vector<int> left(seq_.count);
    std::iota(left.begin(), left.end(), 0);
    for (i64 slot = 0; !left.empty(); ++slot) {
      Slot best = best_slot(left, effort);
      for (std::size_t i = 0; i < best.groups.size(); ++i) {
        const int d = best.groups.sequences[i];
        plan.slots[d] = slot;
        const i64 first = best.groups.offsets[i];
        plan.groups.add(d, best.groups.ranks.data() + first, best.groups.offsets[i + 1] - first);
      }
      plan.makespan += best.duration;
      std::erase_if(left, [&](int d) { return plan.slots[d] >= 0; });
    }
    return plan;
  }

 private:
  struct Slot {
    i64 duration = kNever;
    i64 useful = 0;
    Groups groups;
  };

  const Machine& machine_;
  const Sequences& seq_;
  int outlook_;
  i64 constant_;  // ticks of one micro-batch whatever it holds

  // Durations in turn, each first with the fewest shared sequences, then with many. The more were tried, the sooner one
  // is good enough: idle time of 1/1024 of the work at first (1/4096 in small batches, which cost little to search), more with every pair tried.
  Slot best_slot(const std::vector<int>& left, int effort) const {
    Slot best;
    int tried = 0;
    for (i64 target : durations(left)) {
      for (i64 spread_from : {kNever, spread_from_}) {
        Slot slot = fill(left, target, spread_from);
        if (slot.useful > 0 && better(slot, best)) best = std::move(slot);
        ++tried;
        if (best.useful > 0 && idle(best) * (seq_.count < 4096 ? 4096 : 1024) < static_cast<__int128>(best.useful) * (1 + tried / 4)) return best;
      }
      if (tried >= effort && best.useful > 0) break;
    }
    return best;
  }

  __int128 idle(const Slot& slot) const { return static_cast<__int128>(slot.duration) * machine_.world - slot.useful; }

  Slot fill(const std::vector<int>& order, i64 target, i64 spread_from) const {
    Slot slot;
    BoardOptions options;
    options.target = target;
    options.barrier = true;
    options.spread_from = spread_from;
    Board board(machine_, seq_, options);
    board.fill(order, slot.groups);
    const auto& placed = slot.groups.sequences;
    if (std::find(placed.begin(), placed.end(), order.front()) == placed.end()) return slot;  // the longest must go
    slot.duration = board.most() + constant_;
    for (int d : placed) slot.useful += seq_.work[d];
    return slot;
  }

  // Of two ways to fill a slot the one that idles less: by what it gets done, or in sum, with what is left expected to
  // idle by `outlook_` 64ths of its work.
  bool better(const Slot& a, const Slot& b) const {
    if (b.useful == 0) return true;
    __int128 left = idle(a) * b.useful, right = idle(b) * a.useful;
    if (outlook_ >= 0) {
      left = idle(a) * 64 - static_cast<__int128>(a.useful) * outlook_;
      right = idle(b) * 64 - static_cast<__int128>(b.useful) * outlook_;
    }
    return left != right ? left < right : a.useful > b.useful;
  }

  // Durations to try: an equal part of all that is left, for the fewest slots that its tokens need and a few more; and what
  // the longest sequence takes on groups of several sizes.
  std::vector<i64> durations(const std::vector<int>& left) const {
    const int d = left.front();
    const i64 size = machine_.largest(), world = machine_.world, low = std::max<i64>(1, seq_.smallest[d]);
    std::vector<i64> shares;
    if (low <= size) shares.push_back(share(machine_, seq_, d, size, 0));
    for (i64 n = low; n < size; n = n * 3 / 2 + 1) shares.push_back(share(machine_, seq_, d, n, 0));
    const i64 most = std::min<i64>(world, std::max<i64>(low, 4 * most_hidden(machine_, seq_, d, world, 1)));
    if (most > size) shares.push_back(share(machine_, seq_, d, most, 1));
    // Past that the ring shows, but a slot that has little else to do is still shorter.
    for (i64 n = most; n > size && n < world; n *= 2) {
      const i64 wider = share(machine_, seq_, d, std::min(world, 2 * n), 1);
      if (wider > shares.back() - shares.back() / 64) break;
      shares.push_back(wider);
    }
    for (i64 n = std::max<i64>(low, size + 1); n < most; n = n * 5 / 4 + machine_.node) {
      shares.push_back(share(machine_, seq_, d, std::min(world, ceil_div(n, machine_.node) * machine_.node), 1));
    }
    __int128 work = 0, tokens = 0;
    for (int e : left) work += seq_.work[e], tokens += seq_.length[e];
    const __int128 room = static_cast<__int128>(machine_.capacity) * world;
    const i64 average = static_cast<i64>(work / world) + 1, slots = static_cast<i64>((tokens + room - 1) / room);
    // As many ranks as the longest sequence has of the work.
    const i64 fair = std::clamp<i64>(static_cast<i64>(static_cast<__int128>(seq_.work[d]) * world / work), low, world);
    shares.push_back(share(machine_, seq_, d, fair, fair > size));
    const i64 shortest = *std::min_element(shares.begin(), shares.end());
    std::vector<i64> targets;
    for (i64 permille : {1, 5, 15, 40}) {
      for (i64 k = slots; k < slots + 3; ++k) {
        const i64 target = average / k + average / k / 1000 * permille;
        if (target >= shortest) targets.push_back(target);
      }
    }
    std::sort(shares.begin(), shares.end());
    // Alternate, so that either kind comes early.
    std::vector<i64> mixed;
    if (seq_.work[d] > average) mixed.push_back(share(machine_, seq_, d, fair, fair > size));
    for (std::size_t i = 0; i < std::max(targets.size(), shares.size()); ++i) {
      if (i < targets.size()) mixed.push_back(targets[i]);
      if (i < shares.size()) mixed.push_back(shares[i]);
    }
    return mixed;
  }

  i64 spread_from_ = std::min<i64>(machine_.capacity / 2, 4096);
};

inline Assignment plan_slot(const Machine& machine, const Sequences& seq, i64 constant, int effort) {
  __int128 work = 0;
  for (i64 ticks : seq.work) work += ticks;
  // Few sequences, or much idle time: other outlooks are affordable, or worth it.
  Assignment best;
  int runs = 0;
  for (int outlook : {-1, 4, 0, 16}) {
    Assignment plan = SlotSearch(machine, seq, constant, outlook).run(effort);
    if (plan.makespan < best.makespan) best = std::move(plan);
    const __int128 idle = static_cast<__int128>(best.makespan) * machine.world - work;
    if (idle * 128 < work || (++runs >= 1 && seq.count > 2048)) break;
  }
  return best;
}

}  // namespace planner
