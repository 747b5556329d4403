// Regime slot: every slot is a barrier, so slots are filled one at a time. A slot must hold the longest sequence left; its
// duration is chosen among a few so that the idle time it buys is the smallest part of the work it does. Where every sequence
// fits a node, packs that are each cut over equal parts of the nodes are tried as well: fewer to level, equal within a part.
#pragma once

#include <optional>

#include "planner_board.h"
#include "planner_level.h"

namespace planner {

class SlotSearch {
 public:
  SlotSearch(const Machine& machine, const Sequences& seq, i64 constant, int outlook)
      : machine_(machine), seq_(seq), outlook_(outlook), constant_(constant) {}

  Assignment run(int effort) {
    Assignment plan, ended;
    plan.slots.assign(seq_.count, -1);
    plan.makespan = 0;
    std::vector<int> left(seq_.count);
    std::iota(left.begin(), left.end(), 0);
    for (i64 slot = 0; !left.empty(); ++slot) {
      if (Slot last = last_slot(left, ended.makespan - plan.makespan); last.useful > 0) {
        ended = plan;
        append(ended, slot, last);
      }
      append(plan, slot, best_slot(left, effort));
      std::erase_if(left, [&](int d) { return plan.slots[d] >= 0; });
    }
    return ended.makespan < plan.makespan ? ended : plan;
  }

 private:
  struct Slot {
    i64 duration = kNever;
    i64 useful = 0;
    Groups groups;
  };

  static constexpr int kFew = 4096;  // sequences of a batch that costs little to search

  const Machine& machine_;
  const Sequences& seq_;
  int outlook_;
  i64 constant_;  // ticks of one micro-batch whatever it holds

  // Durations in turn, each first with the fewest shared sequences, then with many. The more were tried, the sooner one
  // is good enough: idle time of 1/1024 of the work at first (1/4096 in small batches, which cost little to search), more with
  // every pair tried.
  Slot best_slot(const std::vector<int>& left, int effort) const {
    Slot best;
    int tried = 0;
    for (i64 target : durations(left)) {
      for (i64 spread_from : {kNever, spread_from_}) {
        Slot slot = fill(left, target, spread_from);
        if (slot.useful > 0 && better(slot, best)) best = std::move(slot);
        ++tried;
        if (best.useful > 0 && idle(best) * (seq_.count < kFew ? 4096 : 1024) < static_cast<__int128>(best.useful) * (1 + tried / 4)) return best;
      }
      if (tried >= effort && best.useful > 0) break;
    }
    return best;
  }

  // All that is left in one slot that takes less than `most`, in as little time as a few halvings find; useful is 0 where
  // there is none. The fullest slot is not always the last: what little it leaves costs another barrier.
  Slot last_slot(const std::vector<int>& left, i64 most) const {
    Slot best;
    __int128 work = 0, tokens = 0;
    for (int d : left) work += seq_.work[d], tokens += seq_.length[d];
    if (seq_.count > kFew || tokens > static_cast<__int128>(machine_.capacity) * machine_.world) return best;
    i64 low = static_cast<i64>(work / machine_.world), high = std::min<i64>(most, 4 * (low + seq_.work[left.front()])) - constant_;
    for (int halving = 0; halving < 10 && low < high; ++halving) {
      const i64 target = low + (high - low) / 2;
      bool all = false;
      for (i64 spread_from : {kNever, spread_from_}) {
        Slot slot = fill(left, target, spread_from);
        if (slot.groups.size() < left.size()) continue;
        all = true;
        if (slot.duration < std::min(most, best.duration)) best = std::move(slot);
      }
      (all ? high : low) = target;
    }
    return best;
  }

  void append(Assignment& plan, i64 slot, const Slot& filled) const {
    for (std::size_t i = 0; i < filled.groups.size(); ++i) {
      const int d = filled.groups.sequences[i];
      plan.slots[d] = slot;
      const i64 first = filled.groups.offsets[i];
      plan.groups.add(d, filled.groups.ranks.data() + first, filled.groups.offsets[i + 1] - first);
    }
    plan.makespan += filled.duration;
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
    const i64 most = std::min<i64>(world, std::max<i64>(low, 4 * most_hidden(machine_, seq_, d, 1)));
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
    // Where a slot costs much by itself, one that is uneven but full may spare another.
    const bool costly = constant_ * 32 > average / slots;
    if (costly) {
      std::sort(shares.begin(), shares.end());
      for (i64 i = std::min<i64>(shares.size(), 3) - 1; i >= 0; --i) {
        for (i64 part : {8, 4, 2}) shares.push_back(shares[i] + average / slots / part);
      }
    }
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

// Packs of one part each, as many as the slots hold, dealt heaviest first: the packs of a slot weigh about the same.
class Packs {
 public:
  Packs(const Machine& machine, const Sequences& seq, i64 constant) : machine_(machine), seq_(seq), constant_(constant) {}

  // Nothing where nodes differ, or a sequence needs more than one.
  std::optional<Assignment> run() {
    if (seq_.count == 0 || machine_.world % machine_.largest()) return std::nullopt;
    size_ = best_size();
    if (size_ == 0) return std::nullopt;
    i64 tokens = 0;
    for (int d = 0; d < seq_.count; ++d) tokens += ceil_div(seq_.length[d], size_);
    const i64 fewest = ceil_div(tokens, machine_.capacity * parts());
    for (i64 slots = fewest; slots < fewest + 3; ++slots) {
      if (auto plan = pack(slots)) return plan;
    }
    return std::nullopt;
  }

 private:
  struct Pack {
    i64 work = 0, tokens = 0;
    Ring ring;
  };

  const Machine& machine_;
  const Sequences& seq_;
  i64 constant_;
  i64 size_ = 0;  // ranks of a part

  int parts() const { return static_cast<int>(machine_.world / size_); }

  // The widest divisor of a node over which an average pack hides its ring as well as over any other; 0: nothing fits.
  i64 best_size() const {
    Pack all;
    i64 longest = 0, best = 0, least = kNever;
    for (int d = 0; d < seq_.count; ++d) {
      add(all, d, seq_.length[d]);
      longest = std::max(longest, seq_.length[d]);
    }
    for (i64 n = 1; n <= machine_.largest(); ++n) {
      if (machine_.largest() % n || ceil_div(longest, n) > machine_.capacity) continue;
      const i64 packs = machine_.world / n * std::max<i64>(1, ceil_div(all.tokens, machine_.capacity * machine_.world));
      const i64 ticks = n == 1 ? all.work / packs : ring_share(machine_, n, 0, all.ring.part(packs));
      if (ticks <= least + least / 4096) best = n;
      least = std::min(least, ticks);
    }
    return best;
  }

  // Each sequence to the pack with the least work that has room; none if some has none.
  std::optional<Assignment> pack(i64 slots) const {
    using Entry = std::pair<i64, int>;
    const int count = static_cast<int>(slots * parts());
    std::vector<Pack> packs(count);
    std::vector<int> pack_of(seq_.count);
    std::vector<Entry> entries(count);
    for (int p = 0; p < count; ++p) entries[p] = {0, p};
    std::priority_queue<Entry, std::vector<Entry>, std::greater<Entry>> lightest(std::greater<Entry>(), std::move(entries));
    std::priority_queue<Entry> full;  // by room: packs that a longer sequence did not fit
    for (int d = 0; d < seq_.count; ++d) {
      const i64 part = ceil_div(seq_.length[d], size_);
      while (!full.empty() && full.top().first >= part) {
        const int p = full.top().second;
        full.pop();
        lightest.push({packs[p].work, p});
      }
      while (!lightest.empty() && packs[lightest.top().second].tokens + part > machine_.capacity) {
        const int p = lightest.top().second;
        lightest.pop();
        full.push({machine_.capacity - packs[p].tokens, p});
      }
      if (lightest.empty()) return std::nullopt;
      const int p = lightest.top().second;
      lightest.pop();
      add(packs[p], d, part);
      pack_of[d] = p;
      lightest.push({packs[p].work, p});
    }
    return deal(packs, pack_of);
  }

  void add(Pack& pack, int d, i64 part) const {
    pack.work += seq_.work[d];
    pack.tokens += part;
    pack.ring.add(seq_, d, 0);
  }

  Assignment deal(const std::vector<Pack>& packs, const std::vector<int>& pack_of) const {
    const int row = parts();
    std::vector<int> order(packs.size()), place(packs.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return packs[a].work > packs[b].work; });
    Assignment plan;
    plan.makespan = 0;
    for (std::size_t i = 0; i < order.size(); ++i) place[order[i]] = static_cast<int>(i);
    for (std::size_t i = 0; i < order.size(); i += row) {
      i64 longest = 0;
      for (int v = 0; v < row; ++v) longest = std::max(longest, ticks(packs[order[i + v]]));
      if (packs[order[i]].tokens > 0) plan.makespan += longest + constant_;
    }
    plan.slots.resize(seq_.count);
    std::vector<int> ranks(size_);
    for (int d = 0; d < seq_.count; ++d) {
      plan.slots[d] = place[pack_of[d]] / row;
      std::iota(ranks.begin(), ranks.end(), place[pack_of[d]] % row * static_cast<int>(size_));
      plan.groups.add(d, ranks.data(), ranks.size());
    }
    return plan;
  }

  i64 ticks(const Pack& pack) const {
    if (size_ == 1) return pack.work;
    return ring_share(machine_, size_, 0, pack.ring);
  }
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
  // Cutting every short sequence is only worth it where it shows.
  if (const __int128 idle = static_cast<__int128>(best.makespan) * machine.world - work; idle * 2048 > work) {
    if (auto packs = Packs(machine, seq, constant).run(); packs && packs->makespan < best.makespan - best.makespan / 2048) {
      best = std::move(*packs);
    }
  }
  if (seq.count > 0) SlotLevel(machine, seq, constant, best).run();
  return best;
}

}  // namespace planner
