#include "plan/file.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <istream>
#include <iterator>
#include <new>
#include <ostream>

#include "base/status.h"

namespace fusco::plan {

namespace {

static_assert(std::endian::native == std::endian::little, "the file is written as it lies in memory");

constexpr char kMagic[8] = {'F', 'U', 'S', 'C', 'O', 'P', 'L', 'N'};
constexpr std::uint32_t kFileVersion = 1;
// A short file must not make the reader take much memory: tables that grow with products are bounded.
constexpr std::int64_t kMostTableEntries = std::int64_t{1} << 22;

class Writer {
 public:
  template <typename T>
  void value(T v) {
    bytes_.append(reinterpret_cast<const char*>(&v), sizeof v);
  }
  template <typename T>
  void list(const std::vector<T>& items) {
    value<std::uint64_t>(items.size());
    bytes_.append(reinterpret_cast<const char*>(items.data()), items.size() * sizeof(T));
  }
  std::string take() { return std::move(bytes_); }

 private:
  std::string bytes_;
};

class Reader {
 public:
  explicit Reader(std::string_view bytes) : bytes_(bytes) {}

  [[noreturn]] void refuse(const std::string& what) const {
    fail(Code::invalidArgument, "plan file, byte " + std::to_string(at_) + ": " + what);
  }
  template <typename T>
  T value(const char* name) {
    T v;
    std::memcpy(&v, take(sizeof v, name), sizeof v);
    return v;
  }
  template <typename T>
  std::vector<T> list(const char* name) {
    const auto count = value<std::uint64_t>(name);
    if (count > (bytes_.size() - at_) / sizeof(T)) {
      refuse(std::string(name) + ": " + std::to_string(count) + " items do not fit the rest of the file");
    }
    std::vector<T> items(count);
    if (count > 0) std::memcpy(items.data(), take(count * sizeof(T), name), count * sizeof(T));
    return items;
  }
  bool atEnd() const { return at_ == bytes_.size(); }

 private:
  const char* take(std::size_t count, const char* name) {
    if (count > bytes_.size() - at_) refuse(std::string("the file ends within ") + name);
    const char* from = bytes_.data() + at_;
    at_ += count;
    return from;
  }

  std::string_view bytes_;
  std::size_t at_ = 0;
};

void writeTopology(Writer& writer, const Topology& topology) {
  std::vector<std::int32_t> nodeOf;
  for (int rank = 0; rank < topology.ranks(); ++rank) nodeOf.push_back(topology.nodeOf(rank));
  writer.list(nodeOf);
  writer.value<std::int32_t>(topology.lanesPerNode());
  writer.value<std::uint64_t>(topology.version());
  std::vector<std::int32_t> pairs;  // source, node
  for (int source = 0; source < topology.ranks(); ++source) {
    for (int node = 0; node < topology.nodes(); ++node) {
      if (topology.hasOwnFlows(source, node)) pairs.insert(pairs.end(), {source, node});
    }
  }
  writer.list(pairs);
  for (std::size_t i = 0; i < pairs.size(); i += 2) {
    const auto flows = topology.flowsTo(pairs[i], pairs[i + 1]);
    writer.list(std::vector<FlowShare>(flows.begin(), flows.end()));
  }
}

Topology readTopology(Reader& reader) {
  const auto nodeOf = reader.list<std::int32_t>("the node of each rank");
  const auto lanes = reader.value<std::int32_t>("lanes");
  const auto version = reader.value<std::uint64_t>("the topology's version");
  const auto pairs = reader.list<std::int32_t>("pairs with flows of their own");
  std::vector<std::int32_t> labels(nodeOf);
  std::sort(labels.begin(), labels.end());
  std::int64_t nodes = 0, largest = 0;
  for (std::size_t i = 0; i < labels.size(); ++nodes) {
    const auto end = std::upper_bound(labels.begin() + i, labels.end(), labels[i]) - labels.begin();
    largest = std::max<std::int64_t>(largest, end - static_cast<std::int64_t>(i));
    i = end;
  }
  const std::int64_t table = nodes * (pairs.empty() ? largest : static_cast<std::int64_t>(nodeOf.size()));
  if (table > kMostTableEntries) {
    reader.refuse(std::to_string(nodeOf.size()) + " ranks on " + std::to_string(nodes) +
                  " nodes are more than a file may bring");
  }
  if (pairs.size() % 2 != 0) reader.refuse("half a pair of source and node");
  Topology topology({nodeOf.begin(), nodeOf.end()}, lanes);
  topology.setVersion(version);
  for (std::size_t i = 0; i < pairs.size(); i += 2) {
    topology.setFlows(pairs[i], pairs[i + 1], reader.list<FlowShare>("flows"));
  }
  return topology;
}

}  // namespace

RoutingMap PlanFile::map() const {
  return {ids.data(), idBytes, weights.empty() ? nullptr : weights.data(), tokens, topk, experts};
}

PlanFile record(const RoutingMap& map, const Topology& topology, int rank, const Options& options,
                const Exchanged& exchanged) {
  arenaBytes(map, topology, rank, options);  // refuses a shape that makes no sense before its product is used
  const std::size_t slots = static_cast<std::size_t>(map.tokens) * map.topk;
  const auto* ids = static_cast<const std::byte*>(map.ids);
  PlanFile file{topology, rank, options, exchanged, map.idBytes, map.tokens, map.topk, map.experts, {}, {}};
  if (slots > 0) file.ids.assign(ids, ids + slots * map.idBytes);
  if (map.weights != nullptr) file.weights.assign(map.weights, map.weights + slots);
  return file;
}

std::string encode(const PlanFile& file) {
  Writer writer;
  for (const char c : kMagic) writer.value(c);
  writer.value(kFileVersion);
  writer.value<std::int32_t>(file.rank);
  writeTopology(writer, file.topology);
  writer.value(static_cast<std::uint32_t>(file.options.layout));
  writer.value(static_cast<std::uint32_t>(file.options.dedup));
  writer.value<std::int32_t>(file.options.alignment);
  writer.value<std::int64_t>(file.options.maxTokens);
  writer.value<std::int64_t>(file.options.capacityRows);
  writer.list(file.exchanged.before);
  writer.list(file.exchanged.total);
  writer.value<std::int32_t>(file.idBytes);
  writer.value<std::int64_t>(file.tokens);
  writer.value<std::int32_t>(file.topk);
  writer.value<std::int32_t>(file.experts);
  writer.list(file.ids);
  writer.list(file.weights);
  return writer.take();
}

PlanFile decode(std::string_view bytes) {
  Reader reader(bytes);
  for (const char c : kMagic) {
    if (reader.value<char>("the magic word") != c) reader.refuse("this is no plan file");
  }
  const auto version = reader.value<std::uint32_t>("the version");
  if (version != kFileVersion) {
    reader.refuse("version " + std::to_string(version) + "; this library reads version " +
                  std::to_string(kFileVersion));
  }
  const auto rank = reader.value<std::int32_t>("the rank");
  PlanFile file{readTopology(reader), rank, {}, {}, 8, 0, 0, 0, {}, {}};
  file.options.layout = static_cast<Layout>(reader.value<std::uint32_t>("the layout"));
  file.options.dedup = static_cast<Dedup>(reader.value<std::uint32_t>("dedup"));
  file.options.alignment = reader.value<std::int32_t>("the alignment");
  file.options.maxTokens = reader.value<std::int64_t>("the most tokens of a rank");
  file.options.capacityRows = reader.value<std::int64_t>("the capacity");
  file.exchanged.before = reader.list<std::int32_t>("rows before");
  file.exchanged.total = reader.list<std::int32_t>("rows in all");
  file.idBytes = reader.value<std::int32_t>("the bytes of an id");
  file.tokens = reader.value<std::int64_t>("tokens");
  file.topk = reader.value<std::int32_t>("top-k");
  file.experts = reader.value<std::int32_t>("experts");
  file.ids = reader.list<std::byte>("expert ids");
  file.weights = reader.list<float>("weights");
  if (!reader.atEnd()) reader.refuse("bytes after the end");
  if (file.experts > kMostTableEntries)
    reader.refuse(std::to_string(file.experts) + " experts are more than a file may bring");
  RoutingMap shape = file.map();
  static constexpr std::int64_t kNoIds = 0;
  if (shape.ids == nullptr) shape.ids = &kNoIds;              // the number of ids is judged below
  arenaBytes(shape, file.topology, file.rank, file.options);  // refuses a shape that makes no sense
  const std::uint64_t slots = static_cast<std::uint64_t>(file.tokens) * file.topk;
  if (file.ids.size() != slots * file.idBytes)
    reader.refuse(std::to_string(file.ids.size()) + " bytes of ids for " + std::to_string(slots) + " slots");
  if (!file.weights.empty() && file.weights.size() != slots) {
    reader.refuse(std::to_string(file.weights.size()) + " weights for " + std::to_string(slots) + " slots");
  }
  return file;
}

void save(const PlanFile& file, std::ostream& stream) {
  const std::string bytes = encode(file);
  if (!stream.write(bytes.data(), static_cast<std::streamsize>(bytes.size())).flush()) {
    fail(Code::systemError,
         "plan file: " + std::to_string(bytes.size()) + " bytes could not be written; is the disk full?");
  }
}

PlanFile load(std::istream& stream) {
  const std::string bytes{std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
  if (stream.bad())
    fail(Code::systemError, "plan file: reading failed after " + std::to_string(bytes.size()) + " bytes");
  return decode(bytes);
}

OwnedArena replay(const PlanFile& file) {
  const RoutingMap map = file.map();
  const Analysis analysis = analyse(map, file.topology, file.rank, file.options);
  OwnedArena arena(std::aligned_alloc(64, arenaBytes(map, file.topology, file.rank, file.options)));
  if (!arena) throw std::bad_alloc();
  makePlan(map, file.topology, file.rank, file.options, analysis, file.exchanged, arena.get());
  return arena;
}

}  // namespace fusco::plan
