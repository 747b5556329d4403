// The events of hdp::simulator: operations, layers, rounds, collectives.
#pragma once

#include "simulator_core.h"

namespace simulator {

inline Simulator::Simulator(const Input& input) : in_(input) {
  actors_.resize(in_.actors);
  nic_out_.resize(in_.nics);
  nic_in_.resize(in_.nics);
  fabric_.resize(in_.stages);
  gathers_.resize(in_.stages);
  reduces_.resize(in_.stages);
  stage_size_.assign(in_.stages, 0);
  for (i64 a = 0; a < in_.actors; ++a) ++stage_size_[in_.stage[a]];
  stage_nics_.resize(in_.stages);
  for (i64 a = 0; a < in_.actors; ++a) {
    std::vector<i64>& nics = stage_nics_[in_.stage[a]];
    if (nics.empty() || nics.back() != in_.nic[a]) nics.push_back(in_.nic[a]);
  }
  begun_.assign(in_.member_first[in_.exchanges], 0);
  posted_.assign(2 * in_.member_first[in_.exchanges], 0);
  waiting_for_.resize(in_.operations);
  found_.assign(2 * kChannels * in_.actors, -1);
  out_.begin.assign(in_.operations, kUnknown);
  out_.end.assign(in_.operations, kUnknown);
  out_.busy.assign(in_.actors, 0);
  out_.finish.assign(in_.actors, 0);
  out_.nic_busy.assign(in_.nics, 0);
}

inline Output Simulator::run() {
  for (i64 a = 0; a < in_.actors; ++a) {
    actors_[a].op = in_.op_first[a];
    wake(a, 0);
  }
  while (!queue_.empty()) {
    const Event event = queue_.top();
    queue_.pop();
    ++out_.events;
    advance(event.actor, event.time);
  }
  for (i64 a = 0; a < in_.actors; ++a) {
    if (actors_[a].state != Actor::kDone) {
      throw std::runtime_error("the simulated step hangs: actor " + std::to_string(a) + " waits in its operation " +
                               std::to_string(actors_[a].op - in_.op_first[a]) + ", round " +
                               std::to_string(actors_[a].round));
    }
  }
  return std::move(out_);
}

inline void Simulator::advance(i64 a, i64 now) {
  Actor& actor = actors_[a];
  switch (actor.state) {
    case Actor::kOperation: return begin_operation(a, now);
    case Actor::kLayer: return begin_layer(a, now);
    case Actor::kRoundEnd: ++actor.round; return begin_round(a, now);
    case Actor::kCompute: return begin_round(a, now);
    case Actor::kLayerEnd: return end_layer(a, now);
    case Actor::kOperationEnd: return end_operation(a, now);
    case Actor::kWaiting:
    case Actor::kDone: throw std::logic_error("an actor without work was woken");
  }
}

inline void Simulator::begin_operation(i64 a, i64 now) {
  Actor& actor = actors_[a];
  if (actor.op == in_.op_first[a + 1]) {
    actor.state = Actor::kDone;
    out_.finish[a] = now;
    return;
  }
  const i64 before = in_.after[actor.op];
  if (before >= 0) {
    if (out_.end[before] == kUnknown) {
      waiting_for_[before].push_back(a);  // woken by its end
      return;
    }
    const i64 arrives = out_.end[before] + in_.delay[actor.op];
    if (arrives > now) {
      wake(a, arrives);
      return;
    }
  }
  out_.begin[actor.op] = now;
  actor.layer = 0;
  actor.setup = setup_ticks(a);
  actor.copy.free = now;
  actor.copied = 0;
  actor.state = Actor::kLayer;
  if (in_.flags[actor.op] & kGathers) {  // of the first piece: nothing hides it
    post(gathers_[in_.stage[a]], actor.gathered, a, now, gather_ticks(0));
  }
  begin_layer(a, now);
}

// Gathers of one pass: the first layer alone, for nothing hides it, then as much a piece as that piece hides.
inline i64 Simulator::gather_ticks(i64 number) const {
  const i64 first = in_.gather / in_.model_layers;
  if (number == 0) return in_.root_gather + first;
  const i64 pieces = in_.layers == in_.model_layers ? in_.layers - 1 : in_.layers;  // the last layer hides none
  return number <= pieces ? piece(in_.gather - first, number - 1, pieces) : 0;
}

inline Meeting& Simulator::meet(std::vector<Meeting>& meetings, i64 number) {
  if (static_cast<i64>(meetings.size()) <= number) meetings.resize(number + 1);
  return meetings[number];
}

// All actors of a stage post collectives of one kind in the same order; the last one starts it.
inline void Simulator::post(std::vector<Meeting>& meetings, i64 number, i64 a, i64 now, i64 ticks) {
  Meeting& meeting = meet(meetings, number);
  const i64 stage = in_.stage[a];
  ++meeting.posted;
  meeting.latest = std::max(meeting.latest, now);
  if (meeting.posted < stage_size_[stage]) return;
  meeting.end = fabric_[stage].serve(meeting.latest, ticks);
  if (in_.collectives_cross) {
    for (i64 nic : stage_nics_[stage]) nic_out_[nic].serve(meeting.end - ticks, ticks);
  }
  for (i64 waiter : meeting.waiting) wake(waiter, std::max(meeting.end, now));
  std::vector<i64>().swap(meeting.waiting);
}

inline void Simulator::begin_layer(i64 a, i64 now) {
  Actor& actor = actors_[a];
  const i64 op = actor.op, flags = in_.flags[op], stage = in_.stage[a];
  if (flags & kGathers) {
    Meeting& meeting = meet(gathers_[stage], actor.gathered);
    if (meeting.end == kUnknown) {
      meeting.waiting.push_back(a);
      return;
    }
    if (meeting.end > now) return wake(a, meeting.end);
    ++actor.gathered;
    post(gathers_[stage], actor.gathered, a, now, gather_ticks(actor.layer + 1));  // ahead of time
  }
  if (flags & kFirst) {  // parameters gathered once, before the step, layer after layer
    const i64 upto = in_.blocking ? in_.model_layers : actor.layer * in_.model_layers / in_.layers + 1;
    const i64 there = in_.root_gather + in_.gather / in_.model_layers * upto;
    if (there > now) return wake(a, there);
  }
  if (in_.copy[op] && !in_.backward[op]) {  // some layers may be on their way out
    const i64 out = actor.copy.free - in_.leaving * in_.copy[op] / in_.model_layers;
    if (out > now) return wake(a, out);
  }
  actor.layer_begin = now;
  i64 dense = piece(in_.dense[op], actor.layer, in_.layers) + piece(actor.setup, actor.layer, in_.layers);
  if (flags & (kGathers | kFirst)) dense += piece(in_.gather_host, actor.layer, in_.layers);
  if (flags & kReduces) dense += piece(in_.reduce_host, actor.layer, in_.layers);
  actor.filler = piece(in_.filler[op], actor.layer, in_.layers);
  out_.busy[a] += dense + actor.filler;
  actor.round = 0;
  actor.rounds = rounds_of_operation(op);
  actor.parity[0] = actor.parity[1] = Waiting{};
  actor.state = Actor::kCompute;
  wake(a, computes(a, now, dense));
}

// When `ticks` of computing are done. A host with a quota has run for part of each period when it is throttled until the
// next; `ticks` is the long-run time, so after a wait, with its quota unused, it is faster than that. Periods begin at
// another time on every host.
inline i64 Simulator::computes(i64 a, i64 begin, i64 ticks) {
  if (in_.quota_period == 0 || ticks == 0) return begin + ticks;
  Actor& actor = actors_[a];
  const i64 period = in_.quota_period, quota = in_.quota, shift = shift_of(a);
  i64 need = static_cast<i64>(static_cast<__int128>(ticks) * quota / period);
  begin += shift;
  const i64 now = begin / period;
  if (now != actor.period) actor.period = now, actor.used = 0;
  const i64 here = std::min({need, quota - actor.used, (now + 1) * period - begin});
  need -= here;
  actor.used += here;
  if (need == 0) return begin + here - shift;
  const i64 more = (need - 1) / quota;  // whole periods
  actor.period = now + 1 + more;
  actor.used = need - more * quota;
  return actor.period * period + actor.used - shift;
}

// How many ticks of computing fit in between.
inline i64 Simulator::could_compute(i64 a, i64 begin, i64 end) const {
  if (in_.quota_period == 0) return std::max(end - begin, i64{0});
  if (end <= begin) return 0;
  const Actor& actor = actors_[a];
  const i64 period = in_.quota_period, quota = in_.quota;
  begin += shift_of(a);
  end += shift_of(a);
  const i64 first = begin / period, last = end / period;
  const i64 left = quota - (first == actor.period ? actor.used : 0);
  i64 cpu = std::min(left, (first == last ? end : (first + 1) * period) - begin);
  if (last > first) cpu += (last - first - 1) * quota + std::min(quota, end - last * period);
  return static_cast<i64>(static_cast<__int128>(cpu) * period / quota);
}

inline i64 Simulator::tile_ticks(const Actor& actor, i64 s) const {
  const i64 x = in_.share_exchange[s];
  if (in_.kind[x] < kTables) {  // zigzag: every member, every step alike
    const i64 size = size_of(x), mine = (in_.area[x] + size - 1) / size;
    const Steps steps = steps_of(x, actor.round);
    return between(mine, actor.layer * size + steps.first, actor.layer * size + steps.last, in_.layers * size);
  }
  const Table& table = in_.tables[in_.kind[x] - kTables];
  const double part = table.area[in_.share_member[s] * table.rounds + actor.round];
  return piece(std::llround(part * static_cast<double>(in_.area[x])), actor.layer, in_.layers);
}

inline void Simulator::begin_round(i64 a, i64 now) {
  Actor& actor = actors_[a];
  if (actor.round == actor.rounds) {
    actor.state = Actor::kLayerEnd;
    wake(a, computes(a, now, actor.filler));
    actor.filler = 0;
    return;
  }
  const i64 op = actor.op, round = actor.round;
  actor.state = Actor::kWaiting;
  Waiting& mine = actor.parity[round & 1];
  mine = Waiting{};
  collect(a, round);
  for (const Message& message : messages_) ++(message.is_send ? mine.sends : mine.receives);
  i64 tiles = 0, steps = 0, pieces = 0;
  for (i64 s = in_.share_first[op]; s < in_.share_first[op + 1]; ++s) {
    const i64 x = in_.share_exchange[s];
    if (round >= rounds_of(x)) continue;
    tiles += tile_ticks(actor, s);
    pieces += pieces_of(x, in_.share_member[s], round);
    steps = std::max(steps, steps_of(x, round).last - steps_of(x, round).first);
  }
  tiles += steps * piece(in_.round_ticks, actor.layer, in_.layers) + piece(pieces * in_.piece_ticks, actor.layer, in_.layers);
  const i64 posting = piece(messages_collected() * in_.message_ticks, actor.layer, in_.layers);
  out_.busy[a] += tiles + posting;
  actor.round_begin = now;
  const i64 posted = computes(a, now, posting);  // nothing leaves before
  actor.computed = computes(a, posted, tiles);
  const auto number = [&](i64 x) { return actor.layer * rounds_of(x) + round + 1; };
  for (i64 s = in_.share_first[op]; s < in_.share_first[op + 1]; ++s) {
    const i64 x = in_.share_exchange[s], place = in_.member_first[x] + in_.share_member[s];
    if (round >= rounds_of(x)) continue;
    begun_[place] = number(x);
    posted_[2 * place + (number(x) & 1)] = posted;
  }
  for (const Message& message : messages_) {
    const i64 x = message.exchange, place = in_.member_first[x] + message.member;
    if (begun_[place] < number(x)) continue;  // the peer will see to it
    transfer(a, message, round, std::max(posted, posted_[2 * place + (number(x) & 1)]));
  }
  settle_round(a);
}

// One of actor a's messages, once both ends have posted it.
inline void Simulator::transfer(i64 mine, const Message& message, i64 round, i64 now) {
  const i64 a = message.is_send ? mine : message.peer, b = message.is_send ? message.peer : mine;
  Actor &sender = actors_[a], &receiver = actors_[b];
  const bool across = in_.node[a] != in_.node[b];
  const i64 ticks = piece(message.ticks, receiver.layer, in_.layers);
  i64 sent, there;
  ++out_.messages;
  if (across) {  // a NIC serves one rank at the rate of all that share it
    const i64 alone = (ticks + in_.nic_share - 1) / in_.nic_share;
    sent = nic_out_[in_.nic[a]].serve(now, alone);
    there = std::max(sent, nic_in_[in_.nic[b]].serve(sent - alone, alone));
    out_.nic_busy[in_.nic[a]] += alone;
  } else {
    sent = sender.send.serve(now, ticks);
    there = std::max(sent, receiver.receive.serve(sent - ticks, ticks));
  }
  there += message.count * piece(in_.latency[across], receiver.layer, in_.layers);
  Waiting &out = sender.parity[round & 1], &in = receiver.parity[round & 1];
  out.sent = std::max(out.sent, sent);
  in.arrived = std::max(in.arrived, there);
  --out.sends;
  --in.receives;
  settle_round(a);
  settle_round(b);
}

// Schedules the end of a round once all that it waits for is known. Whole sequences are computed while it waits.
inline void Simulator::settle_round(i64 a) {
  Actor& actor = actors_[a];
  if (actor.state != Actor::kWaiting) return;
  const Waiting &mine = actor.parity[actor.round & 1], &before = actor.parity[(actor.round + 1) & 1];
  const bool is_last = actor.round + 1 == actor.rounds;
  if (mine.receives > 0 || before.sends > 0 || (is_last && mine.sends > 0)) return;
  const i64 there = std::max({mine.arrived, before.sent, is_last ? mine.sent : 0});
  const i64 fill = std::min(actor.filler, could_compute(a, actor.computed, there));
  const i64 computed = computes(a, actor.computed, fill);
  actor.filler -= fill;
  i64 end = std::max(computed, there);
  if (in_.overlap < 1.0) {  // what runs beside each other slows each other down
    const i64 both = std::min(there, computed) - actor.round_begin;
    end += std::llround((1.0 - in_.overlap) * static_cast<double>(std::max(both, i64{0})));
  }
  actor.state = Actor::kRoundEnd;
  wake(a, end);
}

inline void Simulator::end_layer(i64 a, i64 now) {
  Actor& actor = actors_[a];
  const i64 op = actor.op;
  if (in_.copy[op] && actor.copied == actor.layer) {
    ++actor.copied;
    actor.copy.serve(actor.layer_begin, piece(in_.copy[op], actor.layer, in_.layers));
    // Backward needs what it computes with; forward only needs room, see begin_layer.
    if (in_.backward[op] && actor.copy.free > now) return wake(a, actor.copy.free);
  }
  if (in_.flags[op] & kReduces) {
    std::vector<Meeting>& reduces = reduces_[in_.stage[a]];
    const i64 rest = actor.layer + 1 == in_.layers ? in_.root_reduce : 0;
    if (!actor.posted) post(reduces, actor.reduced++, a, now, piece(in_.reduce, actor.layer, in_.layers) + rest);
    actor.posted = in_.blocking;
    if (in_.blocking) {
      Meeting& meeting = meet(reduces, actor.reduced - 1);
      if (meeting.end == kUnknown) {
        meeting.waiting.push_back(a);
        return;
      }
      if (meeting.end > now) return wake(a, meeting.end);
      actor.posted = false;
    }
  }
  if (++actor.layer == in_.layers) return end_operation(a, now);
  actor.state = Actor::kLayer;
  begin_layer(a, now);
}

inline void Simulator::end_operation(i64 a, i64 now) {
  Actor& actor = actors_[a];
  const i64 stage = in_.stage[a], flags = in_.flags[actor.op];
  actor.state = Actor::kOperationEnd;
  i64 latest = now;
  for (const Flag flag : {kGathers, kReduces}) {
    if (!(flags & flag)) continue;
    Meeting& meeting = flag == kGathers ? meet(gathers_[stage], actor.gathered) : meet(reduces_[stage], actor.reduced - 1);
    if (meeting.end == kUnknown) {
      meeting.waiting.push_back(a);
      return;
    }
    latest = std::max(latest, meeting.end);
  }
  if (latest > now) return wake(a, latest);
  if (flags & kGathers) ++actor.gathered;
  out_.end[actor.op] = now;
  for (i64 waiter : waiting_for_[actor.op]) wake(waiter, now);
  ++actor.op;
  actor.state = Actor::kOperation;
  begin_operation(a, now);
}

}  // namespace simulator
