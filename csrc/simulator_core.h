// A discrete-event simulation of one training step, in whole ticks.
//
// Actors (one rank of one pipeline stage each) run operations in order: the forward or backward pass of one micro-batch,
// cut into `layers` equal pieces. A piece computes its dense part, then goes through the rounds of its exchanges (the
// attention programs of shared sequences), round k of all of them together, whole sequences filling the waits.
//
// [Note: one event a round] An actor has one event at a time: the end of what it does. Events leave the queue in order
// of time, ties by actor, so ports (links, NICs) serve messages first come, first served. A message starts when both its
// ends have begun its round and their hosts have posted its messages, as with NCCL and with gloo's large ones; a round ends
// when its tiles are computed, its messages received, and the messages of the round before sent.
//
// [Note: one message] What goes from one rank to another in one round, on one channel (a lane's inputs, or its sums), is one
// message, of however many exchanges: that is how the executor packs it. Both ends hold the same exchanges in one operation
// and are in the same round of all of them, so both find the same messages.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <queue>
#include <stdexcept>
#include <string>
#include <vector>

namespace simulator {

using i64 = std::int64_t;
using i32 = std::int32_t;
constexpr i64 kUnknown = -1;

// What parts [first, last) of `parts` equal ones hold of `total`; all parts add up to it.
inline i64 between(i64 total, i64 first, i64 last, i64 parts) {
  if (total < (i64{1} << 40) && parts < (i64{1} << 22)) return total * last / parts - total * first / parts;
  const auto wide = static_cast<__int128>(total);
  return static_cast<i64>(wide * last / parts - wide * first / parts);
}

inline i64 piece(i64 total, i64 i, i64 parts) { return parts == 1 ? total : between(total, i, i + 1, parts); }

// A member's number, one turn of the ring off at most.
inline i64 wrap(i64 member, i64 size) { return member < 0 ? member + size : (member >= size ? member - size : member); }

enum Flag : i64 { kGathers = 1, kReduces = 2, kFirst = 4 };
enum Template : i64 { kRingForward = 0, kRingBackward = 1, kTables = 2 };

constexpr i64 kChannels = 4;  // two lanes, inputs and sums apart
constexpr i64 kInputs = 0, kSums = 1;  // of the first lane

// The rounds of a schedule other than the ring, counted from its programs. Messages are sorted by (member, round) of
// their sender; `received` lists them by (member, round) of their receiver.
struct Table {
  i64 size = 0, rounds = 0;
  std::vector<double> area;               // [size * rounds] of the whole sequence's
  std::vector<i64> pieces;                // [size * rounds]: tiles of one sequence
  std::vector<i64> send_first;            // [size * rounds + 1]
  std::vector<i64> from, to, channel;     // members; see [Note: one message]
  std::vector<double> weight;             // in units of the exchange
  std::vector<i64> receive_first;         // [size * rounds + 1]
  std::vector<i64> received;              // message numbers
};

struct Input {
  i64 layers = 1;                          // pieces of every pass
  i64 most_rounds = 1;                     // of one exchange; more steps of a ring are taken together
  i64 model_layers = 1;                    // layers that they stand for
  const i64 *stage, *node, *nic;           // [actors]
  i64 actors = 0, stages = 1, nics = 0, nic_share = 1;
  const i64* op_first;                     // [actors + 1]
  const i64 *backward, *dense, *filler, *after, *delay, *copy, *flags;  // [operations]
  i64 operations = 0;
  const i64* share_first;                  // [operations + 1]
  const i64 *share_exchange, *share_member;
  const i64 *kind, *area, *documents, *member_first, *member_actor;  // exchanges; documents: sequences packed in each
  const double* unit;                      // [exchanges, 2 tiers, 2 kinds of bytes]: ticks of one weight, all layers
  i64 exchanges = 0;
  i64 latency[2] = {0, 0};                 // one hop in all layers
  i64 leaving = 2;                         // layers whose copies may be under way when forward begins the next one
  i64 round_ticks = 0;                     // host time of one round in all layers
  i64 piece_ticks = 0, message_ticks = 0;  // host time of a sequence's tile and of a message, in all layers
  i64 piece_setup = 0, message_setup = 0;  // the same once an operation
  i64 gather = 0, reduce = 0;              // collectives over all layers
  i64 root_gather = 0, root_reduce = 0;    // of what belongs to no layer: gathered first, reduced last
  i64 gather_host = 0, reduce_host = 0;    // what they take from computing
  i64 quota_period = 0, quota = 0;         // a host computes for `quota` of each period, at full speed; 0: always
  bool collectives_cross = false;          // they occupy the NICs
  bool blocking = false;                   // nothing is computed during a collective
  double overlap = 1.0;                    // part of the shorter of compute and messages that hides behind the longer
  std::vector<Table> tables;
};

struct Output {
  std::vector<i64> begin, end;             // [operations]
  std::vector<i64> busy, finish;           // [actors]
  std::vector<i64> nic_busy;               // [nics]
  i64 events = 0, messages = 0;
};

// A first-come, first-served port.
struct Port {
  i64 free = 0;
  i64 serve(i64 time, i64 ticks) { return free = std::max(free, time) + ticks; }
};

// A part of a message: what one exchange has in it. In a thick round it stands for `count` messages, one after the other.
struct Part {
  bool is_send;
  i64 peer;        // member of the exchange
  i64 channel;
  i64 bytes;       // which of the exchange's two kinds
  double weight;
  i64 count;
};

// A message of an actor's round, see [Note: one message].
struct Message {
  bool is_send;
  i64 peer;        // actor
  i64 exchange;    // one of those in it, and the peer's member there
  i64 member;
  i64 key;         // in Simulator::found_
  i64 ticks;       // on the link, in all layers
  i64 count;
};

struct Steps {
  i64 first, last;  // [first, last)
};

struct Waiting {
  i64 arrived = 0, sent = 0;     // latest known
  int receives = 0, sends = 0;   // not yet known
};

struct Actor {
  i64 op = 0, layer = 0, round = 0, rounds = 0;
  i64 filler = 0;                // local attention left in this piece
  i64 setup = 0;                 // of this operation's programs
  i64 round_begin = 0;
  i64 computed = 0;              // when this round's tiles are done
  i64 layer_begin = 0;
  i64 period = -1, used = 0;     // of the host's quota
  Waiting parity[2];             // this round's and the last one's messages
  Port copy, send, receive;
  i64 copied = 0;                // pieces whose copies are under way
  bool posted = false;           // it waits for the collective that it has posted
  i64 gathered = 0, reduced = 0; // collectives posted so far
  // What it does when woken; kWaiting: messages or collectives that are under way wake it.
  enum State { kOperation, kLayer, kCompute, kRoundEnd, kWaiting, kLayerEnd, kOperationEnd, kDone } state = kOperation;
};

struct Meeting {
  i64 posted = 0, latest = 0, end = kUnknown;
  std::vector<i64> waiting;
};

class Simulator {
 public:
  explicit Simulator(const Input& input);
  Output run();

 private:
  struct Event {
    i64 time, actor;
    bool operator<(const Event& other) const {
      return time != other.time ? time > other.time : actor > other.actor;
    }
  };

  void wake(i64 actor, i64 time) { queue_.push({time, actor}); }
  void advance(i64 a, i64 now);
  void begin_operation(i64 a, i64 now);
  void begin_layer(i64 a, i64 now);
  void begin_round(i64 a, i64 now);
  void settle_round(i64 a);
  void end_layer(i64 a, i64 now);
  void end_operation(i64 a, i64 now);

  i64 computes(i64 a, i64 begin, i64 ticks);
  i64 could_compute(i64 a, i64 begin, i64 end) const;
  i64 shift_of(i64 a) const { return a * (in_.quota_period * 618 / 1000) % in_.quota_period; }
  i64 tile_ticks(const Actor& actor, i64 share) const;
  i64 pieces_of(i64 exchange, i64 member, i64 round) const;
  i64 rounds_of(i64 exchange) const;
  i64 rounds_of_operation(i64 op) const;
  i64 setup_ticks(i64 a);
  void collect(i64 a, i64 round);
  i64 messages_collected() const;
  template <class Visit> void parts(i64 exchange, i64 member, i64 round, Visit visit) const;
  template <class Visit> void ring_parts(i64 exchange, i64 member, i64 round, Visit visit) const;
  i64 size_of(i64 exchange) const;
  Steps steps_of(i64 exchange, i64 round) const;
  void transfer(i64 a, const Message& message, i64 round, i64 now);

  Meeting& meet(std::vector<Meeting>& meetings, i64 number);
  void post(std::vector<Meeting>& meetings, i64 number, i64 a, i64 now, i64 ticks);
  i64 gather_ticks(i64 number) const;

  const Input& in_;
  Output out_;
  std::priority_queue<Event> queue_;
  std::vector<Actor> actors_;
  std::vector<i64> begun_;                        // per exchange member: rounds begun so far, all pieces counted
  std::vector<i64> posted_;                       // [exchange members, 2]: when the host has posted an even or odd round
  std::vector<Port> nic_out_, nic_in_, fabric_;   // fabric: one communicator a stage
  std::vector<std::vector<Meeting>> gathers_, reduces_;
  std::vector<std::vector<i64>> stage_nics_;
  std::vector<i64> stage_size_;
  std::vector<std::vector<i64>> waiting_for_;     // operation: actors that wait for its end
  std::vector<Message> messages_;                 // of the round at hand
  std::vector<i32> found_;                        // [actors, channels, 2]: where such a message is there, -1: nowhere
};

inline i64 Simulator::size_of(i64 x) const { return in_.member_first[x + 1] - in_.member_first[x]; }

inline i64 Simulator::rounds_of(i64 x) const {
  if (in_.kind[x] >= kTables) return in_.tables[in_.kind[x] - kTables].rounds;
  return std::min(size_of(x), in_.most_rounds);
}

// Steps of a schedule that a round stands for: one, or several neighbouring ones of a ring of many members.
inline Steps Simulator::steps_of(i64 x, i64 round) const {
  const i64 rounds = rounds_of(x), steps = in_.kind[x] >= kTables ? rounds : size_of(x);
  return {round * steps / rounds, (round + 1) * steps / rounds};
}

inline i64 Simulator::rounds_of_operation(i64 op) const {
  i64 rounds = 0;
  for (i64 s = in_.share_first[op]; s < in_.share_first[op + 1]; ++s) {
    rounds = std::max(rounds, rounds_of(in_.share_exchange[s]));
  }
  return rounds;
}

// Tiles of one member in one round: each sequence of the exchange has its own, however they are packed.
inline i64 Simulator::pieces_of(i64 x, i64 member, i64 round) const {
  if (in_.kind[x] < kTables) {
    const Steps steps = steps_of(x, round);
    return in_.documents[x] * (steps.last - steps.first);
  }
  const Table& table = in_.tables[in_.kind[x] - kTables];
  return in_.documents[x] * table.pieces[member * table.rounds + round];
}

// What a member of a causal zigzag ring sends and receives in a round, in blocks: keys and values, and their gradients.
// Forward, steps [0, size - 1): the block at hand, of which nobody looks at the back half if it is member 0's. Backward, the
// other way round: front halves, and back halves that are still looked at, in steps [0, size - 2); the gradients of the block
// of the step before in steps [1, size).
template <class Visit>
void Simulator::ring_parts(i64 x, i64 member, i64 round, Visit visit) const {
  const i64 n = size_of(x);
  const Steps steps = steps_of(x, round);
  const auto length = [](i64 from, i64 to) { return std::max(to - from, i64{0}); };
  const auto halves = [&](i64 from, i64 to, i64 half) {  // steps in [from, to), one of which counts half
    return static_cast<double>(length(from, to)) - 0.5 * (half >= from && half < to);
  };
  const bool is_forward = in_.kind[x] == kRingForward;
  const i64 low = n - steps.last, high = n - steps.first;  // backward: hops that blocks are still away from home
  for (const bool is_send : {true, false}) {
    const i64 peer = wrap(is_send == is_forward ? member + 1 : member - 1, n);
    const i64 from = is_send ? member : peer;
    if (is_forward) {
      const i64 last = std::min(steps.last, n - 1);
      const i64 count = length(steps.first, last);
      if (count) visit(Part{is_send, peer, kInputs, 0, halves(steps.first, last, from), count});
      continue;
    }
    const auto hops = [&](i64 least) { return length(std::max(least, low), high); };
    const i64 inputs = hops(2), sums = length(low, std::min(high, n - 1));
    if (inputs) {
      const i64 back = from > 0 ? hops(std::max(from + 1, i64{2})) : 0;
      visit(Part{is_send, peer, kInputs, 0, 0.5 * static_cast<double>(inputs + back), inputs});
    }
    if (sums) visit(Part{is_send, peer, kSums, 1, halves(low, std::min(high, n - 1), from - 1), sums});
  }
}

template <class Visit>
void Simulator::parts(i64 x, i64 member, i64 round, Visit visit) const {
  if (in_.kind[x] < kTables) return ring_parts(x, member, round, visit);
  const Table& table = in_.tables[in_.kind[x] - kTables];
  const i64 at = member * table.rounds + round;
  for (i64 i = table.send_first[at]; i < table.send_first[at + 1]; ++i) {
    visit(Part{true, table.to[i], table.channel[i], 0, table.weight[i], 1});
  }
  for (i64 i = table.receive_first[at]; i < table.receive_first[at + 1]; ++i) {
    const i64 m = table.received[i];
    visit(Part{false, table.from[m], table.channel[m], 0, table.weight[m], 1});
  }
}

// Brings the messages of an actor's round together, in the order of their first parts.
inline void Simulator::collect(i64 a, i64 round) {
  const i64 op = actors_[a].op;
  messages_.clear();
  for (i64 s = in_.share_first[op]; s < in_.share_first[op + 1]; ++s) {
    const i64 x = in_.share_exchange[s];
    if (round >= rounds_of(x)) continue;
    parts(x, in_.share_member[s], round, [&](const Part& part) {
      const i64 peer = in_.member_actor[in_.member_first[x] + part.peer];
      const double unit = in_.unit[4 * x + 2 * (in_.node[a] != in_.node[peer]) + part.bytes];
      const i64 ticks = std::llround(part.weight * unit);
      const i64 key = 2 * (kChannels * peer + part.channel) + part.is_send;
      i32& found = found_[key];
      if (found < 0) {
        found = static_cast<i32>(messages_.size());
        messages_.push_back({part.is_send, peer, x, part.peer, key, ticks, part.count});
      } else {
        messages_[found].ticks += ticks;
        messages_[found].count = std::max(messages_[found].count, part.count);
      }
    });
  }
  for (const Message& message : messages_) found_[message.key] = -1;
}

inline i64 Simulator::messages_collected() const {
  i64 count = 0;
  for (const Message& message : messages_) count += message.count;
  return count;
}

// Making the programs of an operation: what each tile and each message of all its rounds takes once.
inline i64 Simulator::setup_ticks(i64 a) {
  const i64 op = actors_[a].op;
  if (in_.piece_setup == 0 && in_.message_setup == 0) return 0;
  i64 ticks = 0;
  for (i64 round = rounds_of_operation(op) - 1; round >= 0; --round) {
    collect(a, round);
    ticks += messages_collected() * in_.message_setup;
    for (i64 s = in_.share_first[op]; s < in_.share_first[op + 1]; ++s) {
      const i64 x = in_.share_exchange[s];
      if (round < rounds_of(x)) ticks += pieces_of(x, in_.share_member[s], round) * in_.piece_setup;
    }
  }
  return ticks;
}

}  // namespace simulator
