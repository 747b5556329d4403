// Sequences, machine and cost of a share: the arithmetic of hdp.balance.cost, in whole ticks.
//
// Sequences arrive longest first and are numbered by that order; everything here and above it is integer arithmetic with
// fixed ties, so that every machine makes the same plan.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace planner {

using i64 = std::int64_t;
constexpr i64 kNever = std::numeric_limits<i64>::max() / 4;

inline i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

// Nodes of `node` consecutive ranks; the last may be smaller.
struct Machine {
  int world = 0;
  int node = 0;
  i64 capacity = 0;       // tokens of a micro-batch
  i64 latency[2] = {0, 0};  // one hop in all layers: within a node, across nodes
  i64 tile = 0, message = 0, round = 0;  // what each takes the host in one pass through all layers
  std::vector<int> node_of;  // of each rank

  Machine(int ranks, int ranks_per_node, i64 tokens, i64 within, i64 across)
      : world(ranks), node(ranks_per_node), capacity(tokens), latency{within, across}, node_of(ranks) {
    for (int r = 0; r < world; ++r) node_of[r] = r / node;
  }

  int nodes() const { return (world + node - 1) / node; }
  int begin(int v) const { return v * node; }
  int end(int v) const { return std::min(world, (v + 1) * node); }
  int largest() const { return std::min(node, world); }
};

struct Sequences {
  int count = 0;
  const i64* length = nullptr;
  const i64* linear = nullptr;        // everything but attention, forward and backward
  const i64* attention[2] = {};       // forward, backward
  const i64* ring[2][2] = {};         // [within, across][forward, backward]: all of it over one link
  const i64* handling[2] = {};        // forward, backward: the host's, of all bytes that a ring passes on
  const i64* smallest = nullptr;      // fewest ranks that hold the sequence
  std::vector<i64> work;              // on one rank

  // Remembered once computed, for every board asks again; 0 is unknown.
  i64 narrow = 0;                       // widest group whose shares are remembered
  mutable std::vector<i64> inside;      // share within a node, [sequence, ranks]
  mutable std::vector<int> hidden[2];   // most_hidden within a node, over the world
  mutable std::vector<int> best[2];     // best_size within a node, over the world

  void finish(const Machine& machine) {
    work.resize(count);
    for (int d = 0; d < count; ++d) work[d] = linear[d] + attention[0][d] + attention[1][d] + 2 * machine.tile;
    narrow = std::min<i64>(machine.largest(), 16);
    inside.assign(count * (narrow + 1), 0);
    for (auto& known : hidden) known.assign(count, 0);
    for (auto& known : best) known.assign(count, 0);
  }
};

// Sequences that run as one ring, added up.
struct Ring {
  i64 documents = 0, linear = 0, attention[2] = {0, 0}, bytes[2] = {0, 0}, handling[2] = {0, 0};

  void add(const Sequences& seq, int d, int across) {
    ++documents;
    linear += seq.linear[d];
    for (int phase : {0, 1}) {
      attention[phase] += seq.attention[phase][d];
      bytes[phase] += seq.ring[across][phase][d];
      handling[phase] += seq.handling[phase][d];
    }
  }

  // An average one of `count`.
  Ring part(i64 count) const {
    Ring one = *this;
    one.documents /= count, one.linear /= count;
    for (int phase : {0, 1}) one.attention[phase] /= count, one.bytes[phase] /= count, one.handling[phase] /= count;
    return one;
  }
};

// Ticks of one member of a ring of n: n tiles a pass, each but the last hiding the next hop, and what it takes the host.
inline i64 ring_share(const Machine& machine, i64 n, int across, const Ring& ring) {
  i64 total = ceil_div(ring.linear, n) + 2 * n * (ring.documents * machine.tile + machine.round);
  for (int phase = 0; phase < 2; ++phase) {
    const i64 hops = (n - 1) * machine.latency[across] + ceil_div((n - 1) * ring.bytes[phase], n) + ring.attention[phase] / n / n;
    total += std::max(ceil_div(ring.attention[phase], n), hops);
    total += 2 * (n - 1 + phase * (n - 2)) * machine.message + ceil_div((n - 1) * ring.handling[phase], n);
  }
  return total;
}

// Ticks of one member's share of a sequence.
inline i64 share(const Machine& machine, const Sequences& seq, int d, i64 n, int across) {
  if (n <= 1) return seq.work[d];
  const auto ticks = [&] {
    Ring ring;
    ring.add(seq, d, across);
    return ring_share(machine, n, across, ring);
  };
  if (across || n > seq.narrow) return ticks();
  i64& known = seq.inside[d * (seq.narrow + 1) + n];
  if (known == 0) known = ticks();
  return known;
}

// Ranks of a node, or of the world, over which a share is shortest. Shares fall with n until the hops of the ring, their
// latency and what they take the host, outweigh what the others take over.
inline i64 best_size(const Machine& machine, const Sequences& seq, int d, int across) {
  const int high = across ? machine.world : machine.largest();
  int& known = seq.best[across][d];
  if (known != 0) return known;
  int falls = 0, rises = high;
  while (rises - falls > 1) {
    const int mid = (falls + rises) / 2;
    (share(machine, seq, d, mid + 1, across) < share(machine, seq, d, mid, across) ? falls : rises) = mid;
  }
  return known = rises;
}

// Fewest ranks in [low, high] whose share is at most `ticks`; high + 1 when there is none.
inline i64 fewest(const Machine& machine, const Sequences& seq, int d, i64 ticks, i64 low, i64 high, int across) {
  const i64 best = std::clamp(best_size(machine, seq, d, across), low, std::max(low, high));
  i64 bad = low - 1, good = best + 1;
  while (good - bad > 1) {
    const i64 mid = (good + bad) / 2;
    (share(machine, seq, d, mid, across) <= ticks ? good : bad) = mid;
  }
  return good > best ? high + 1 : good;
}

// Most ranks of a node, or of the world, over which the ring still hides, up to 1/128 of the work.
inline i64 most_hidden(const Machine& machine, const Sequences& seq, int d, int across) {
  int& known = seq.hidden[across][d];
  if (known != 0) return known;
  const i64 limit = seq.work[d] + seq.work[d] / 128;
  int good = 1, bad = (across ? machine.world : machine.largest()) + 1;
  while (bad - good > 1) {
    const int mid = (good + bad) / 2;
    (share(machine, seq, d, mid, across) * mid <= limit ? good : bad) = mid;
  }
  return known = good;
}

// Groups of the sequences placed so far, one after the other; a sequence is placed at most once.
struct Groups {
  std::vector<int> sequences;
  std::vector<i64> offsets{0};
  std::vector<int> ranks;  // ascending within a group

  void add(int d, const int* first, std::size_t count) {
    sequences.push_back(d);
    ranks.insert(ranks.end(), first, first + count);
    offsets.push_back(static_cast<i64>(ranks.size()));
  }
  std::size_t size() const { return sequences.size(); }
};

// One group's ranks, without owning them.
struct Members {
  const int* first = nullptr;
  const int* last = nullptr;
  const int* begin() const { return first; }
  const int* end() const { return last; }
  std::size_t size() const { return static_cast<std::size_t>(last - first); }
  int front() const { return *first; }
  int back() const { return *(last - 1); }
  bool operator==(const Members& other) const { return std::equal(first, last, other.first, other.last); }
};

// Where and when the sequences of one plan run.
struct Assignment {
  Groups groups;
  std::vector<i64> slots;  // of each sequence
  i64 makespan = kNever;
};

}  // namespace planner
