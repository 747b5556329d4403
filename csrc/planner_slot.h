// Regime slot: every slot is a barrier, so slots are filled one at a time. A slot must hold the longest sequence left; its
// duration is chosen among a few so that the idle time it buys is the smallest part of the work it does.
#pragma once

#include "planner_board.h"

namespace planner {

class SlotSearch {
 public:
  SlotSearch(const Machine& machine, const Sequences& seq) : machine_(machine), seq_(seq) {}

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
      left = std::move(best.left);
    }
    return plan;
  }

 private:
  struct Slot {
    i64 duration = kNever;
    i64 useful = 0;
    std::vector<int> left;
    Groups groups;
  };

  const Machine& machine_;
  const Sequences& seq_;

  Slot best_slot(const std::vector<int>& left, int effort) const {
    Slot best;
    const i64 spread = std::min<i64>(machine_.capacity / 2, 4096);
    for (i64 target : durations(left, effort)) {
      for (i64 spread_from : {kNever, spread}) {
        Slot tried = fill(left, target, spread_from);
        if (tried.useful > 0 && better(tried, best)) best = std::move(tried);
        if (enough(best)) return best;
      }
    }
    return best;
  }

  // Idle time below 1/1024 of the work.
  bool enough(const Slot& slot) const {
    return slot.useful > 0 && static_cast<__int128>(slot.duration) * machine_.world - slot.useful < slot.useful / 1024;
  }

  Slot fill(const std::vector<int>& order, i64 target, i64 spread_from) const {
    Slot slot;
    BoardOptions options;
    options.target = target;
    options.barrier = true;
    options.spread_from = spread_from;
    Board board(machine_, seq_, options);
    slot.left = board.fill(order, slot.groups);
    if (!slot.left.empty() && slot.left.front() == order.front()) return slot;  // the longest must go
    slot.duration = board.most();
    for (int d : slot.groups.sequences) slot.useful += seq_.work[d];
    return slot;
  }

  bool better(const Slot& a, const Slot& b) const {
    if (b.useful == 0) return true;
    const __int128 idle_a = static_cast<__int128>(a.duration) * machine_.world - a.useful;
    const __int128 idle_b = static_cast<__int128>(b.duration) * machine_.world - b.useful;
    const __int128 left = idle_a * b.useful, right = idle_b * a.useful;
    return left != right ? left < right : a.useful > b.useful;
  }

  std::vector<i64> durations(const std::vector<int>& left, int effort) const {
    const int d = left.front();
    const i64 size = machine_.largest(), world = machine_.world, low = std::max<i64>(1, seq_.smallest[d]);
    std::vector<i64> targets;
    i64 shortest = kNever;
    for (i64 n = low; n <= size; n = n * 3 / 2 + 1) targets.push_back(share(machine_, seq_, d, n, 0));
    if (low <= size) targets.push_back(share(machine_, seq_, d, size, 0));
    const i64 most = std::min<i64>(world, std::max<i64>(low, 4 * most_hidden(machine_, seq_, d, world, 1)));
    for (i64 n = std::max<i64>(low, size + 1); n <= most; n = n * 5 / 4 + machine_.node) {
      const i64 whole_nodes = std::min<i64>(world, ceil_div(n, machine_.node) * machine_.node);
      targets.push_back(share(machine_, seq_, d, whole_nodes, 1));
    }
    if (most > size) targets.push_back(share(machine_, seq_, d, most, 1));
    for (i64 t : targets) shortest = std::min(shortest, t);
    __int128 work = 0, tokens = 0;
    for (int e : left) work += seq_.work[e], tokens += seq_.length[e];
    const i64 average = static_cast<i64>(work / world) + 1;
    const i64 fewest_slots = static_cast<i64>((tokens + static_cast<__int128>(machine_.capacity) * world - 1) /
                                              (static_cast<__int128>(machine_.capacity) * world));
    for (i64 k = fewest_slots; k < fewest_slots + 3; ++k) {
      for (i64 permille : {1, 4, 10, 20, 40}) targets.push_back(average / k + average / k / 1000 * permille);
    }
    std::erase_if(targets, [&](i64 t) { return t < shortest; });
    std::reverse(targets.begin(), targets.end());
    (void)effort;
    return targets;
  }
};

inline Assignment plan_slot(const Machine& machine, const Sequences& seq, int effort) {
  return SlotSearch(machine, seq).run(effort);
}

}  // namespace planner
