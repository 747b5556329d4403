// The board: ranks that fill up with shares until a target time, in three passes from the widest groups to the narrowest.
//
// (1) Sequences that need several nodes take windows of whole nodes. (2) Sequences that need several ranks are spread
// inside one node. (3) The others stay whole, longest first, on the least loaded rank; one that would break the target is
// spread over ranks with room instead, which is what levels the last wave. Groups of the three passes are nested, so that
// ranks that meet have had the same shared work before and do not wait.
#pragma once

#include <numeric>
#include <queue>
#include <utility>

#include "planner_core.h"

namespace planner {

struct BoardOptions {
  i64 target = 0;           // ticks that no rank should exceed
  bool barrier = false;     // regime slot: one micro-batch a rank; tokens count, waiting does not; leftovers are allowed
  i64 spread_from = kNever;  // sequences of at least this many tokens are spread inside a node though they fit one rank
  bool aligned = false;      // groups of several nodes are equal parts of the world: nested, so that none waits
  bool in_order = false;     // the last wave runs where the board puts it, after the whole sequences placed before it
  bool wide_groups = false;  // of two choices that waste alike, the one that is done first, not the one that starts first
};

class Board {
 public:
  Board(const Machine& machine, const Sequences& seq, const BoardOptions& options)
      : machine_(machine),
        seq_(seq),
        options_(options),
        load(machine.world, 0),
        tokens(machine.world, 0),
        waited_(machine.world, 0),
        node_sum_(machine.nodes(), 0),
        node_average_(machine.nodes(), 0),
        node_most_(machine.nodes(), 0),
        node_tokens_(machine.nodes(), 0) {}

  // Places the sequences of `order` (ascending, so longest first). In regime slot some may find no place.
  void fill(const std::vector<int>& order, Groups& groups) {
    const i64 size = machine_.largest();
    // Whole sequences are the tail of the order: both work and smallest group fall with the length.
    const auto whole = std::partition_point(order.begin(), order.end(), [&](int d) {
      return seq_.smallest[d] > 1 || seq_.work[d] > options_.target || (size > 1 && seq_.length[d] >= options_.spread_from);
    });
    std::vector<int> inside;
    for (auto it = order.begin(); it != whole; ++it) {
      const int d = *it;
      const bool fits_rank = seq_.smallest[d] <= 1 && seq_.work[d] <= options_.target;
      if (seq_.smallest[d] > size || (!fits_rank && share(machine_, seq_, d, size, 0) > options_.target)) {
        settle(d, place_wide(d, options_.target), groups);
      } else {
        inside.push_back(d);
      }
    }
    for (auto d = inside.begin(); d != inside.end();) {
      const bool put = settle(*d, place_inside(*d), groups);
      ++d;
      if (put || !options_.barrier) continue;
      // No node has that much room: on to the first sequence for which one has.
      const i64 room = options_.target - *std::min_element(node_average_.begin(), node_average_.end());
      d = std::partition_point(d, inside.end(), [&](int e) { return share(machine_, seq_, e, size, 0) > room; });
    }
    charge_waits_ = options_.in_order && !options_.barrier;
    before_level = shared.size();
    // What a rank waits for its sharers can hold whole sequences.
    for (int r = 0; r < machine_.world; ++r) {
      load[r] -= waited_[r];
      node_sum_[machine_.node_of[r]] -= waited_[r];
    }
    std::fill(waited_.begin(), waited_.end(), 0);
    for (int v = 0; v < machine_.nodes(); ++v) average(v);
    place_whole(&*order.begin() + (whole - order.begin()), &*order.begin() + order.size(), groups);
  }

  i64 most() const { return *std::max_element(load.begin(), load.end()); }

 private:
  using Ranks = std::vector<int>;
  using Entry = std::pair<i64, int>;
  using Heap = std::priority_queue<Entry, std::vector<Entry>, std::greater<Entry>>;  // (load, rank), loads may be old
  struct Choice {
    Ranks ranks;
    i64 finish = kNever;
    i64 waste = kNever;
    i64 start = kNever;
    bool feasible = false;
    int first = 0, count = 0;  // consecutive ranks, until they are listed
  };

  const Machine& machine_;
  const Sequences& seq_;
  BoardOptions options_;
  bool charge_waits_ = !options_.barrier;
  i64 cursor_ = 0;  // ranks below have a sequence of their own
  int levels_left_ = 64;  // regime slot: sequences that could not be levelled before the search for that ends
  int spreads_left_ = options_.barrier ? 16 : 256;  // budget of searches over the whole world
  std::vector<int> by_load_;
  std::vector<i64> most_tokens_, sums_;  // over the first of some ranks

 public:
  std::vector<i64> load;    // ticks of each rank
  std::vector<i64> tokens;  // of each rank
  std::vector<int> shared;  // shared sequences in the order in which they were placed
  std::size_t before_level = 0;  // how many of them were placed before the whole sequences

 private:
  std::vector<i64> waited_;  // until the last shared sequence of each rank began
  std::vector<i64> node_sum_, node_average_, node_most_, node_tokens_;

  void put(int d, const Ranks& ranks, i64 ticks) {
    const i64 n = static_cast<i64>(ranks.size());
    i64 start = 0;
    if (n > 1 && charge_waits_) {
      for (int r : ranks) start = std::max(start, load[r]);
    }
    for (i64 m = 0; m < n; ++m) {
      const int r = ranks[m], v = machine_.node_of[r];
      if (const i64 wait = std::max<i64>(0, start - load[r]); wait > 0) {
        waited_[r] += wait;
        load[r] += wait;
        node_sum_[v] += wait;
      }
      load[r] += ticks;
      tokens[r] += seq_.length[d] / n + (m < seq_.length[d] % n);
      node_sum_[v] += ticks;
      node_most_[v] = std::max(node_most_[v], load[r]);
      node_tokens_[v] = std::max(node_tokens_[v], tokens[r]);
    }
    for (i64 m = 0; m < n; m += 1) {
      if (m + 1 == n || machine_.node_of[ranks[m + 1]] != machine_.node_of[ranks[m]]) average(machine_.node_of[ranks[m]]);
    }
    if (n > 1) shared.push_back(d);
  }

  void average(int v) { node_average_[v] = node_sum_[v] / (machine_.end(v) - machine_.begin(v)); }

  int across(const Ranks& ranks) const {
    return machine_.node_of[ranks.front()] != machine_.node_of[ranks.back()];
  }

  bool better(const Choice& a, const Choice& b) const {
    if (a.feasible != b.feasible) return a.feasible;
    if (a.feasible) {
      const i64 grain = options_.target / 64 + 1;  // ticks of one rank; less is noise
      if (a.waste / grain != b.waste / grain) return a.waste < b.waste;
      if (!options_.wide_groups && a.start != b.start) return a.start < b.start;
    }
    return a.finish < b.finish;
  }

  // Puts `d` where `choice` says; in regime slot only if that keeps the target. Whether it was put.
  bool settle(int d, Choice choice, Groups& groups) {
    if (choice.ranks.empty() || (options_.barrier && !choice.feasible)) return false;
    std::sort(choice.ranks.begin(), choice.ranks.end());
    put(d, choice.ranks, share(machine_, seq_, d, choice.ranks.size(), across(choice.ranks)));
    groups.add(d, choice.ranks.data(), choice.ranks.size());
    return true;
  }

  // Windows of m whole nodes for a few m from the fewest that keep the target to the most that hide the ring.
  Choice place_wide(int d, i64 target) {
    const i64 world = machine_.world, node = machine_.node;
    const i64 low = std::max<i64>(seq_.smallest[d], std::min<i64>(world, node + 1));
    i64 fewest_ranks = fewest(machine_, seq_, d, target, low, world, 1);
    if (fewest_ranks > world) {
      fewest_ranks = options_.barrier ? world + 1 : std::max<i64>(low, best_size(machine_, seq_, d, 1));
    }
    if (fewest_ranks > world) return {};
    // A sequence that fills its ranks to more than half of the target takes the next untouched ranks, as few as it needs.
    if (!options_.aligned && cursor_ + fewest_ranks <= world && share(machine_, seq_, d, fewest_ranks, 1) > target / 2) {
      Choice choice = measure(d, fewest_ranks, 1, 0, 0, target);
      choice.first = static_cast<int>(cursor_), choice.count = static_cast<int>(fewest_ranks);
      if (choice.feasible) {
        cursor_ += fewest_ranks;
        return filled(std::move(choice));
      }
    }
    cursor_ = world;
    const i64 first = ceil_div(fewest_ranks, node);
    const i64 last = std::max(first, most_hidden(machine_, seq_, d, 1) / node);
    const i64 stride = options_.aligned ? 1 : std::max<i64>(1, (last - first) / 8);
    Choice best;
    for (i64 m = first; m <= machine_.nodes(); m += stride) {
      if (m > last && (!options_.aligned || best.count > 0)) break;
      if (options_.aligned && machine_.nodes() % m) continue;
      Choice found = window(d, static_cast<int>(m), target);
      if (found.count > 0 && (best.count == 0 || better(found, best))) best = found;
    }
    return filled(std::move(best));
  }

  static Choice filled(Choice choice) {
    choice.ranks.resize(choice.count);
    std::iota(choice.ranks.begin(), choice.ranks.end(), choice.first);
    return choice;
  }

  // The window of m nodes that is free first; among those the one with the least waiting.
  Choice window(int d, int m, i64 target) {
    const int nodes = machine_.nodes();
    if (m > nodes) return {};
    i64 best_start = kNever, best_wait = kNever, sum = 0;
    int best_v = -1;
    std::vector<int> deque(nodes);
    int head = 0, tail = 0, blocked = -1;
    for (int v = 0; v < nodes; ++v) {
      while (tail > head && node_most_[deque[tail - 1]] <= node_most_[v]) --tail;
      deque[tail++] = v;
      sum += node_sum_[v];
      const int first = v - m + 1;
      if (options_.barrier && node_tokens_[v] + ceil_div(seq_.length[d], i64{m} * machine_.node) > room_of(d)) blocked = v;
      if (first < 0) continue;
      if (deque[head] < first) ++head;
      const i64 ranks = machine_.end(v) - machine_.begin(first);
      if (blocked < first && ranks >= seq_.smallest[d] && !(options_.aligned && first % m)) {
        const i64 start = node_most_[deque[head]], wait = start * ranks - sum;
        if (start < best_start || (start == best_start && wait < best_wait)) {
          best_start = start, best_wait = wait, best_v = first;
        }
      }
      sum -= node_sum_[first];
    }
    if (best_v < 0) return {};
    const int first = machine_.begin(best_v), end = machine_.end(best_v + m - 1);
    Choice choice = measure(d, end - first, m > 1, best_start, options_.barrier ? 0 : best_wait, target);
    choice.first = first, choice.count = end - first;
    return choice;
  }

  Choice measure(int d, i64 size, int spans, i64 start, i64 wait, i64 target) const {
    const i64 ticks = share(machine_, seq_, d, size, spans);
    Choice choice;
    choice.start = start;
    choice.finish = start + ticks;
    choice.waste = wait + size * ticks - seq_.work[d];
    choice.feasible = choice.finish <= target;
    return choice;
  }

  // Tokens that one micro-batch with a share of `d` may hold (more than the capacity only for an offloaded share).
  i64 room_of(int d) const {
    return std::max(machine_.capacity, ceil_div(seq_.length[d], std::max<i64>(1, seq_.smallest[d])));
  }

  // On the least loaded node that has room; if that breaks the target, over several nodes if that keeps it.
  Choice place_inside(int d) {
    int best_v = -1;
    i64 best_load = kNever;
    const i64 part = ceil_div(seq_.length[d], machine_.node), room = room_of(d);
    for (int v = 0; v < machine_.nodes(); ++v) {
      if (node_average_[v] >= best_load) continue;
      const i64 n = machine_.end(v) - machine_.begin(v);
      if (n < seq_.smallest[d]) continue;
      if (options_.barrier && node_tokens_[v] + (n == machine_.node ? part : ceil_div(seq_.length[d], n)) > room) continue;
      if (node_average_[v] < best_load) best_load = node_average_[v], best_v = v;
    }
    Choice choice = best_v < 0 ? Choice{} : inside(d, best_v, hidden_inside(d));
    if (choice.feasible) return choice;
    Choice spread = spread_world(d);
    return !spread.ranks.empty() && (choice.ranks.empty() || better(spread, choice)) ? spread : choice;
  }

  i64 hidden_inside(int d) const {
    return std::max(seq_.smallest[d], most_hidden(machine_, seq_, d, 0));
  }

  // Over the least loaded ranks of node v: `n` of them or more, fewer only where that alone keeps the target.
  Choice inside(int d, int v, i64 n) {
    Ranks ranks(machine_.end(v) - machine_.begin(v));
    std::iota(ranks.begin(), ranks.end(), machine_.begin(v));
    std::sort(ranks.begin(), ranks.end(), [&](int a, int b) { return std::pair(load[a], a) < std::pair(load[b], b); });
    return over_first(d, ranks, std::min<i64>(n, static_cast<i64>(ranks.size())), 1, 0);
  }

  // The best size of a group made of the first of `ranks`, which ascend by load: sizes from `preferred` on, smaller ones
  // only if none of those keeps the target.
  Choice over_first(int d, const Ranks& ranks, i64 preferred, i64 stride, int spans) {
    const i64 size = static_cast<i64>(ranks.size()), low = std::max<i64>(2, seq_.smallest[d]), room = room_of(d);
    most_tokens_.resize(size + 1);
    sums_.resize(size + 1);
    most_tokens_[0] = sums_[0] = 0;
    for (i64 k = 0; k < size; ++k) {
      most_tokens_[k + 1] = std::max(most_tokens_[k], tokens[ranks[k]]);
      sums_[k + 1] = sums_[k] + load[ranks[k]];
    }
    Choice best;
    i64 best_size = 0;
    for (i64 k = size; k >= low; k -= stride) {
      if (k < preferred && best.feasible) break;
      if (options_.barrier && most_tokens_[k] + ceil_div(seq_.length[d], k) > room) continue;
      const i64 start = load[ranks[k - 1]];
      Choice choice = measure(d, k, spans, start, options_.barrier ? 0 : start * k - sums_[k], options_.target);
      // Evenly loaded nodes take later sequences better than one rank filled to the brim.
      if (!spans) choice.waste += size * choice.finish / 64;
      if (best_size == 0 || better(choice, best)) best = choice, best_size = k;
    }
    best.ranks.assign(ranks.begin(), ranks.begin() + best_size);
    return best;
  }

  i64 widest(int d) const {
    const i64 low = std::max<i64>(2, seq_.smallest[d]);
    return std::min<i64>(machine_.world, std::max<i64>(low, 2 * most_hidden(machine_, seq_, d, 1)));
  }

  // Over the least loaded ranks anywhere: how the last wave is levelled when no node has room of its own.
  Choice spread_world(int d) {
    if (spreads_left_ <= 0) return {};
    --spreads_left_;
    by_load_.resize(machine_.world);
    std::iota(by_load_.begin(), by_load_.end(), 0);
    const auto lighter = [&](int a, int b) { return std::pair(load[a], a) < std::pair(load[b], b); };
    std::partial_sort(by_load_.begin(), by_load_.begin() + widest(d), by_load_.end(), lighter);
    by_load_.resize(widest(d));
    return spread_over(d);
  }

  // Over the first few of `by_load_`.
  Choice spread_over(int d) {
    const i64 size = static_cast<i64>(by_load_.size()), low = std::max<i64>(2, seq_.smallest[d]);
    return over_first(d, by_load_, low, std::max<i64>(1, (size - low) / 16), 1);
  }

  // Longest first on the least loaded rank. Ranks without room for a sequence wait aside until shorter ones come.
  void place_whole(const int* d, const int* end, Groups& groups) {
    std::vector<Entry> entries(machine_.world);
    for (int r = 0; r < machine_.world; ++r) entries[r] = {load[r], r};
    Heap ranks(std::greater<Entry>(), std::move(entries));
    std::priority_queue<Entry> aside;  // by room
    while (d != end) {
      while (!aside.empty() && aside.top().first >= seq_.length[*d]) {
        const int r = aside.top().second;
        aside.pop();
        ranks.push({load[r], r});
      }
      const int rank = least_loaded(*d, ranks, aside);
      if (rank >= 0 && load[rank] + seq_.work[*d] <= options_.target) {
        put_whole(*d, rank);
        groups.add(*d, &rank, 1);
        ++d;
        continue;
      }
      if (levels_left_ > 0 && settle(*d, level(*d, rank, ranks), groups)) {
        ++d;
        continue;
      }
      if (options_.barrier) --levels_left_;
      if (levels_left_ > 0 && seq_.work[*d] >= options_.target / 512) {
        ++d;
        continue;
      }
      // No room for anything that costs as much: on to the first sequence that the least loaded rank can take.
      const i64 room = rank >= 0 ? options_.target - load[rank] : -1;
      d = std::partition_point(d + 1, end, [&](int e) {
        return rank >= 0 ? seq_.work[e] > room : aside.empty() || seq_.length[e] > aside.top().first;
      });
    }
  }

  // The least loaded rank with room for the tokens of `d`, or -1.
  int least_loaded(int d, Heap& ranks, std::priority_queue<Entry>& aside) const {
    while (!ranks.empty()) {
      const auto [ticks, r] = ranks.top();
      if (ticks == load[r] && (!options_.barrier || tokens[r] + seq_.length[d] <= machine_.capacity)) return r;
      ranks.pop();
      if (ticks != load[r]) ranks.push({load[r], r});
      else aside.push({machine_.capacity - tokens[r], r});
    }
    return -1;
  }

  void put_whole(int d, int r) {
    const int v = machine_.node_of[r];
    load[r] += seq_.work[d];
    tokens[r] += seq_.length[d];
    node_sum_[v] += seq_.work[d];
    node_average_[v] += seq_.work[d] / machine_.node;
    node_most_[v] = std::max(node_most_[v], load[r]);
    node_tokens_[v] = std::max(node_tokens_[v], tokens[r]);
  }

  // A sequence that no rank can take whole within the target: spread where that helps, whole where it does not.
  Choice level(int d, int rank, Heap& ranks) {
    Choice best;
    if (rank >= 0) {
      best = measure(d, 1, 0, load[rank], 0, options_.target);
      best.ranks = {rank};
    }
    if (seq_.work[d] < options_.target / 512) return best;
    Choice inside_node = machine_.largest() > 1 ? place_level_inside(d) : Choice{};
    if (!inside_node.ranks.empty() && (best.ranks.empty() || better(inside_node, best))) best = std::move(inside_node);
    if (best.feasible) return best;
    by_load_.clear();
    const i64 high = widest(d);
    while (!ranks.empty() && static_cast<i64>(by_load_.size()) < high) {
      const auto [ticks, r] = ranks.top();
      ranks.pop();
      if (ticks == load[r]) by_load_.push_back(r);
      else ranks.push({load[r], r});
    }
    for (int r : by_load_) ranks.push({load[r], r});
    Choice world = spread_over(d);
    if (!world.ranks.empty() && (best.ranks.empty() || better(world, best))) best = std::move(world);
    return best;
  }

  Choice place_level_inside(int d) {
    int best_v = -1;
    i64 best_load = kNever;
    for (int v = 0; v < machine_.nodes(); ++v) {
      if (node_average_[v] < best_load) best_load = node_average_[v], best_v = v;
    }
    return inside(d, best_v, 2);
  }
};

}  // namespace planner
