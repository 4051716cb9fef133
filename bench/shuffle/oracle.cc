#include "shuffle/oracle.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace fusco::bench {

std::int64_t ShuffleMap::busiestRows() const {
  std::size_t most = 0;
  for (const auto& rows : received) most = std::max(most, rows.size());
  return static_cast<std::int64_t>(most);
}

std::int64_t ShuffleMap::busiestSlots() const {
  std::int64_t most = 0;
  for (const auto& rows : row)
    most = std::max(most, static_cast<std::int64_t>(rows.size() - std::count(rows.begin(), rows.end(), -1)));
  return most;
}

std::int64_t ShuffleMap::mostTokens() const {
  std::int64_t most = 0;
  for (const Routing& r : routing) most = std::max(most, r.tokens);
  return most;
}

ShuffleMap naiveShuffle(const RoutingSource& source, std::int64_t tokens, int ranks) {
  ShuffleMap map;
  map.ranks = ranks;
  map.topk = source.topk();
  map.experts = source.experts();
  std::vector<std::vector<Slot>> ofExpert(static_cast<std::size_t>(map.experts));
  for (int rank = 0; rank < ranks; ++rank) {
    map.routing.push_back(source.make(tokens, rank));
    const Routing& routing = map.routing.back();
    map.row.emplace_back(routing.ids.size(), -1);
    for (std::int32_t t = 0; t < routing.tokens; ++t)
      for (std::int32_t k = 0; k < map.topk; ++k) {
        std::int32_t expert = routing.ids[static_cast<std::size_t>(t) * map.topk + k];
        if (expert >= 0) ofExpert[expert].push_back({rank, t, k});
      }
  }
  map.received.resize(static_cast<std::size_t>(ranks));
  for (int expert = 0; expert < map.experts; ++expert) {
    std::vector<Slot>& rows = map.received[rankOfExpert(expert, ranks, map.experts)];
    for (const Slot& s : ofExpert[expert]) {
      map.row[s.source][static_cast<std::size_t>(s.token) * map.topk + s.slot] = static_cast<std::int32_t>(rows.size());
      rows.push_back(s);
    }
  }
  return map;
}

std::uint64_t MoveMap::busiestBytes() const { return *std::max_element(receiveBytes.begin(), receiveBytes.end()); }

MoveMap naiveMoves(Op op, std::uint64_t bytes, std::size_t elementBytes, std::uint64_t rowBytes, int ranks,
                   std::uint64_t seed) {
  MoveMap map;
  auto n = static_cast<std::size_t>(ranks);
  map.moves.resize(n);
  map.sendBytes.assign(n, 0);
  map.receiveBytes.assign(n, 0);
  map.rowBytes = elementBytes;
  if (op == Op::sendrecv) {
    std::uint64_t all = bytes / elementBytes * elementBytes;
    for (int r = 0; r < ranks; ++r) map.moves[r].push_back({(r + 1) % ranks, 0, 0, all});
    map.sendBytes.assign(n, all);
    map.receiveBytes.assign(n, all);
    return map;
  }
  if (op == Op::alltoallv) {
    std::uint64_t even = bytes / elementBytes / n;
    for (int s = 0; s < ranks; ++s)
      for (int d = 0; d < ranks; ++d) {
        // 7/8, 1, or 9/8 of an even share: uneven, yet each rank sends about what was asked for.
        std::uint64_t block = (even + even * static_cast<std::uint64_t>((s + 2 * d) % 3) / 8 - even / 8) * elementBytes;
        map.moves[s].push_back({d, map.sendBytes[s], map.receiveBytes[d], block});
        map.sendBytes[s] += block;
        map.receiveBytes[d] += block;
      }
    return map;
  }
  map.rowBytes = rowBytes;
  std::uint64_t rows = bytes / rowBytes / n;
  auto shuffled = [&](std::uint64_t salt) {
    std::vector<std::uint64_t> order(rows * n);
    std::iota(order.begin(), order.end(), 0);
    Random random(mix(seed ^ salt));
    for (std::size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random.below(i)]);
    return order;
  };
  std::vector<std::vector<std::uint64_t>> receiveOrder;
  for (int d = 0; d < ranks; ++d) receiveOrder.push_back(shuffled(0x4ec00000u + static_cast<std::uint64_t>(d)));
  for (int s = 0; s < ranks; ++s) {
    std::vector<std::uint64_t> sendOrder = shuffled(0x5e4d0000u + static_cast<std::uint64_t>(s));
    for (int d = 0; d < ranks; ++d)
      for (std::uint64_t i = 0; i < rows; ++i)
        map.moves[s].push_back({d, sendOrder[static_cast<std::uint64_t>(d) * rows + i] * rowBytes,
                                receiveOrder[d][static_cast<std::uint64_t>(s) * rows + i] * rowBytes, rowBytes});
    map.sendBytes[s] = map.receiveBytes[s] = rows * n * rowBytes;
  }
  return map;
}

std::uint64_t wrongInDispatch(const ShuffleMap& map, int rank, const std::byte* output, std::size_t rowBytes, Type type,
                              std::uint64_t seed) {
  std::uint64_t wrong = 0;
  std::vector<std::byte> expected(rowBytes);
  for (int source = 0; source < map.ranks; ++source) {
    const Routing& routing = map.routing[source];
    for (std::int64_t t = 0; t < routing.tokens; ++t) {
      bool filled = false;
      for (int k = 0; k < map.topk; ++k) {
        std::size_t at = static_cast<std::size_t>(t) * map.topk + k;
        if (routing.ids[at] < 0 || rankOfExpert(routing.ids[at], map.ranks, map.experts) != rank) continue;
        if (!filled) fillRow(expected.data(), tokenKey(seed, source, t), 0, rowBytes, type);
        filled = true;
        wrong += differing(output + static_cast<std::size_t>(map.row[source][at]) * rowBytes, expected.data(), rowBytes,
                           bytesOf(type));
      }
    }
  }
  return wrong;
}

std::uint64_t wrongInMoves(const MoveMap& map, int rank, const std::byte* output, Type type, std::uint64_t seed) {
  std::uint64_t wrong = 0;
  constexpr std::size_t kPiece = 1 << 16;
  std::vector<std::byte> expected(kPiece);
  for (std::size_t source = 0; source < map.moves.size(); ++source)
    for (const Move& move : map.moves[source]) {
      if (move.destination != rank) continue;
      for (std::uint64_t done = 0; done < move.bytes; done += kPiece) {
        std::size_t part = std::min<std::uint64_t>(kPiece, move.bytes - done);
        fillRow(expected.data(), bufferKey(seed, static_cast<int>(source)), move.from + done, part, type);
        wrong += differing(output + move.to + done, expected.data(), part, bytesOf(type));
      }
    }
  return wrong;
}

std::uint64_t wrongInCombine(const ShuffleMap& map, int rank, const std::byte* output, std::int64_t hidden, Type type,
                             int levels, std::uint64_t seed) {
  std::size_t element = bytesOf(type), rowBytes = static_cast<std::size_t>(hidden) * element;
  std::vector<std::byte> term(rowBytes);
  std::vector<double> sum(static_cast<std::size_t>(hidden)), magnitude(sum.size());
  const Routing& routing = map.routing[rank];
  double relative = levels * roundingUnit(type) + map.topk * 0x1p-24;
  std::uint64_t wrong = 0;
  for (std::int64_t t = 0; t < routing.tokens; ++t) {
    std::fill(sum.begin(), sum.end(), 0.0);
    std::fill(magnitude.begin(), magnitude.end(), 0.0);
    for (int k = 0; k < map.topk; ++k) {
      std::size_t at = static_cast<std::size_t>(t) * map.topk + k;
      if (routing.ids[at] < 0) continue;
      fillRow(term.data(), slotKey(seed, rank, t, k), 0, rowBytes, type);
      double weight = routing.weights[at];
      for (std::size_t i = 0; i < sum.size(); ++i) {
        double product = weight * toDouble(term.data() + i * element, type);
        sum[i] += product;
        magnitude[i] += std::fabs(product);
      }
    }
    const std::byte* got = output + static_cast<std::size_t>(t) * rowBytes;
    for (std::size_t i = 0; i < sum.size(); ++i) {
      double error = std::fabs(toDouble(got + i * element, type) - sum[i]);
      wrong += !(error <= relative * magnitude[i]);
    }
  }
  return wrong;
}

void fillTokens(std::byte* out, const ShuffleMap& map, int rank, std::size_t rowBytes, Type type, std::uint64_t seed) {
  for (std::int64_t t = 0; t < map.routing[rank].tokens; ++t)
    fillRow(out + static_cast<std::size_t>(t) * rowBytes, tokenKey(seed, rank, t), 0, rowBytes, type);
}

void fillExpertRows(std::byte* out, const ShuffleMap& map, int rank, std::size_t rowBytes, Type type,
                    std::uint64_t seed) {
  for (std::size_t i = 0; i < map.received[rank].size(); ++i) {
    const Slot& s = map.received[rank][i];
    fillRow(out + i * rowBytes, slotKey(seed, s.source, s.token, s.slot), 0, rowBytes, type);
  }
}

}  // namespace fusco::bench
