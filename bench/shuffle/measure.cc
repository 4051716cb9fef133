#include "shuffle/measure.h"

#include <fmt/format.h>

#include <algorithm>
#include <fstream>
#include <numeric>
#include <utility>

#include "shuffle/limit.h"

namespace fusco::bench {

bool carriesOut(const std::string& impl, Op op) {
  if (impl == "mpi-alltoallv") return op != Op::sendrecv;
  if (impl == "mpi-alltoallw") return isShuffle(op) || op == Op::gathersend;
  if (impl == "mpi-sendrecv") return op == Op::sendrecv;
  return true;
}

double percentile(std::vector<double> values, double share) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  double at = share * static_cast<double>(values.size() - 1);
  auto below = static_cast<std::size_t>(at);
  std::size_t above = std::min(below + 1, values.size() - 1);
  return values[below] + (values[above] - values[below]) * (at - static_cast<double>(below));
}

double machineFreeBytes() {
  std::ifstream stream("/proc/meminfo");
  for (std::string line; std::getline(stream, line);)
    if (line.rfind("MemAvailable:", 0) == 0) return std::strtod(line.c_str() + 13, nullptr) * 1024;
  return 1e18;
}

namespace {

void addAcross(const CaseContext& context, CaseSize& size) {
  const Options& o = *context.options;
  const auto nodes = static_cast<std::size_t>(o.nodes);
  std::vector<std::uint64_t> out(nodes, 0), in(nodes, 0);
  std::vector<std::int64_t> seen(nodes, -1);
  std::int64_t stamp = 0;
  for (int r = 0; r < o.ranks; ++r) {
    const Routing& routing = context.map.routing[r];
    const int from = nodeOfRank(r, o.ranks, o.nodes);
    for (std::int64_t t = 0; t < routing.tokens; ++t, ++stamp)
      for (int k = 0; k < context.map.topk; ++k) {
        const std::int32_t id = routing.ids[static_cast<std::size_t>(t * context.map.topk + k)];
        if (id < 0) continue;
        const int to = nodeOfRank(rankOfExpert(id, o.ranks, context.map.experts), o.ranks, o.nodes);
        if (to == from || std::exchange(seen[to], stamp) == stamp) continue;
        out[from] += context.rowBytes;
        in[to] += context.rowBytes;
      }
  }
  size.acrossBytes = std::accumulate(out.begin(), out.end(), std::uint64_t{0});
  size.acrossBusiest = std::max(*std::max_element(out.begin(), out.end()), *std::max_element(in.begin(), in.end()));
}

}  // namespace

CaseSize sizeOf(const CaseContext& context, const std::vector<std::string>& impls) {
  CaseSize size;
  int ranks = context.options->ranks;
  std::uint64_t inputs = 0, outputs = 0, largest = 0;
  for (int r = 0; r < ranks; ++r) {
    inputs += context.inputBytes(r);
    outputs += context.outputBytes(r);
    largest = std::max<std::uint64_t>(largest, context.outputBytes(r));
    size.windowBytes = std::max<std::uint64_t>(
        size.windowBytes, context.which.op == Op::combine ? context.inputBytes(r) : context.outputBytes(r));
  }
  size.readBytes = inputs;
  size.writtenBytes = outputs;
  std::int64_t remote = 0, all = 0;
  auto take = [&](std::int64_t ofRank, std::int64_t fromOthers) {
    if (ofRank <= all) return;
    all = ofRank;
    remote = fromOthers;
  };
  if (isShuffle(context.which.op)) {
    addAcross(context, size);
    const ShuffleMap& map = context.map;
    for (int r = 0; r < ranks; ++r) {
      // Dispatch brings rows to a rank; combine brings back its own tokens' rows.
      std::int64_t rows = 0, others = 0;
      if (context.which.op == Op::dispatch) {
        rows = map.rowsOf(r);
        others =
            std::count_if(map.received[r].begin(), map.received[r].end(), [&](const Slot& s) { return s.source != r; });
      } else {
        for (std::int32_t id : map.routing[r].ids) {
          rows += id >= 0;
          others += id >= 0 && rankOfExpert(id, ranks, map.experts) != r;
        }
      }
      take(rows, others);
    }
    size.count = all;
    size.bytes = all * static_cast<std::int64_t>(context.rowBytes);
  } else {
    std::vector<std::int64_t> others(static_cast<std::size_t>(ranks), 0);
    for (int s = 0; s < ranks; ++s)
      for (const Move& move : context.moves.moves[s])
        if (move.destination != s) others[move.destination] += static_cast<std::int64_t>(move.bytes);
    for (int r = 0; r < ranks; ++r) take(static_cast<std::int64_t>(context.moves.receiveBytes[r]), others[r]);
    size.bytes = all;
    size.count = all / static_cast<std::int64_t>(bytesOf(context.options->type));
  }
  size.remoteShare = all > 0 ? static_cast<double>(remote) / static_cast<double>(all) : 0;
  if (context.which.op == Op::combine) size.outputBytes = largest;
  // Limit: the window and two inputs. fusco: input and output. Peers: input, output and two packed buffers at most.
  size.memoryBytes = static_cast<std::uint64_t>(ranks) * (size.windowBytes + size.outputBytes) + 2 * inputs;
  for (const std::string& impl : impls) {
    if (!carriesOut(impl, context.which.op)) continue;
    size.memoryBytes += inputs + outputs;
    if (impl == "mpi-alltoallv") size.memoryBytes += 2 * std::max(inputs, outputs);
  }
  return size;
}

bool Measurer::step(Sample& sample, Step what, std::uint32_t caseIndex, CaseResult& result) {
  if (sample.dead || (sample.group == kPeerGroup && peersDead_)) return false;
  try {
    harness_.order(sample.group, what, caseIndex, sample.impl, options_.warmup, options_.iterations);
    return true;
  } catch (const GroupFailure& failure) {
    if (sample.group == kOwnGroup) throw;
    sample.dead = true;
    peersDead_ = true;
    result.failed = true;
    result.remarks.push_back(
        fmt::format("{} failed, and with it all MPI peers from here on: {}", sample.impl, failure.what()));
    harness_.end(kPeerGroup);
    return false;
  }
}

void Measurer::collect(Sample& sample) {
  Session& session = harness_.session();
  std::vector<double> round;
  for (int i = 0; i < options_.iterations; ++i) {
    std::int64_t begin = INT64_MAX, end = INT64_MIN;
    for (int r = 0; r < options_.ranks; ++r) {
      begin = std::min(begin, session.times(sample.group, r)[i].begin);
      end = std::max(end, session.times(sample.group, r)[i].end);
    }
    round.push_back(static_cast<double>(end - begin) / 1e3);
  }
  sample.us.insert(sample.us.end(), round.begin(), round.end());
  sample.roundP50.push_back(percentile(round, 0.5));
  sample.stages.resize(static_cast<std::size_t>(options_.ranks));
  for (int r = 0; r < options_.ranks; ++r)
    sample.stages[r] = sample.stages[r] + session.group(sample.group).ranks[r].stages;
}

Row Measurer::rowOf(const Sample& sample, const Case& which, const CaseSize& size) const {
  Row row;
  row.impl = sample.impl;
  row.which = which;
  row.bytes = size.bytes;
  row.count = size.count;
  row.acrossBytes = size.acrossBytes;
  row.acrossBusiest = size.acrossBusiest;
  row.p50Us = percentile(sample.roundP50, 0.5);
  row.p99Us = percentile(sample.us, 0.99);
  row.roundP50Us = sample.roundP50;
  row.algbw = row.p50Us > 0 ? static_cast<double>(size.bytes) / row.p50Us / 1e3 : 0;
  row.busbw = row.algbw * size.remoteShare;
  row.wrong = sample.wrong;
  row.checked = options_.check;
  double iterations = static_cast<double>(sample.us.size());
  auto slowest = [&](std::uint64_t Stages::*stage) {
    std::uint64_t most = 0;
    for (const Stages& s : sample.stages) most = std::max(most, s.*stage);
    return static_cast<double>(most) / iterations / 1e3;
  };
  row.planUs = slowest(&Stages::plan);
  row.extractUs = slowest(&Stages::extract);
  row.wireUs = slowest(&Stages::wire);
  row.placeUs = slowest(&Stages::place);
  row.sumUs = slowest(&Stages::sum);
  row.waitUs = slowest(&Stages::wait);
  for (const Stages& s : sample.stages) row.wireBytes += static_cast<double>(s.wireBytes) / iterations;
  return row;
}

CaseResult Measurer::measure(std::uint32_t caseIndex, const Case& which, const CaseSize& size) {
  CaseResult result;
  double free = machineFreeBytes();
  if (static_cast<double>(size.memoryBytes) > 0.9 * free) {
    result.remarks.push_back(
        fmt::format("left out: its tensors need {:.1f} GB and {:.1f} GB are free; fewer --tokens or one "
                    "--impl at a time need less",
                    static_cast<double>(size.memoryBytes) / 1e9, free / 1e9));
    return result;
  }
  std::vector<Sample> samples;
  // What the host's memory allows says nothing of a GPU's.
  const bool host = options_.device == "host";
  if (host)
    for (const char* name : {"limit-nt", "limit-plain", "fill"})
      samples.push_back({name, kOwnGroup, {}, {}, {}, 0, false});
  const bool byWire = options_.net == "tcp" || options_.net == "verbs";
  const bool wire = byWire && options_.nodes > 1 && options_.netns.empty() && isShuffle(which.op);
  if (wire) samples.push_back({"wire", kOwnGroup, {}, {}, {}, 0, false});
  const std::size_t firstImpl = samples.size();
  for (const std::string& impl : impls_)
    if (impl != "limit" && carriesOut(impl, which.op))
      samples.push_back({impl, impl == "fusco" ? kOwnGroup : kPeerGroup, {}, {}, {}, 0, false});

  auto checkAll = [&] {
    for (Sample& sample : samples)
      if (options_.check && sample.impl != "fill" && sample.impl != "wire" &&
          step(sample, Step::check, caseIndex, result))
        sample.wrong += harness_.wrong(sample.group);
  };
  for (Sample& sample : samples) step(sample, Step::prepare, caseIndex, result);
  checkAll();
  for (int round = 0; round < options_.rounds; ++round)
    for (std::size_t i = 0; i < samples.size(); ++i) {
      // Each round begins with another one, so that none always runs behind the same neighbour.
      Sample& sample = samples[(i + static_cast<std::size_t>(round)) % samples.size()];
      if (step(sample, Step::run, caseIndex, result)) collect(sample);
    }
  checkAll();
  for (Sample& sample : samples) step(sample, Step::release, caseIndex, result);

  if (!host) {
    for (const Sample& sample : samples)
      if (!sample.dead && !sample.us.empty()) result.rows.push_back(rowOf(sample, which, size));
    for (const Row& row : result.rows) result.failed = result.failed || row.wrong > 0;
    return result;
  }
  std::vector<Row> limits;
  for (int i = 0; i < 2; ++i) limits.push_back(rowOf(samples[i], which, size));
  Row limit = limits[0].p50Us <= limits[1].p50Us ? limits[0] : limits[1];
  limit.stores = limit.impl == "limit-nt" ? "non-temporal" : "plain";
  limit.impl = "limit";
  limit.wrong = limits[0].wrong + limits[1].wrong;
  auto written = static_cast<double>(size.writtenBytes);
  limit.writeGbps = limit.p50Us > 0 ? written / limit.p50Us / 1e3 : 0;
  limit.readGbps = limit.p50Us > 0 ? static_cast<double>(size.readBytes) / limit.p50Us / 1e3 : 0;
  double fillUs = percentile(samples[2].roundP50, 0.5);
  limit.fillGbps = fillUs > 0 ? written / fillUs / 1e3 : 0;
  if (wire) limit.wireAloneUs = percentile(samples[3].roundP50, 0.5);
  result.rows.push_back(limit);
  for (std::size_t i = firstImpl; i < samples.size(); ++i)
    if (!samples[i].dead && !samples[i].us.empty()) result.rows.push_back(rowOf(samples[i], which, size));
  for (Row& row : result.rows) {
    row.limit = limit.algbw;
    row.ofLimit = row.p50Us > 0 ? limit.p50Us / row.p50Us : 0;
    result.failed = result.failed || row.wrong > 0;
  }
  return result;
}

}  // namespace fusco::bench
