#include "shuffle/cuda/measure.h"

#include <fmt/format.h>

#include <algorithm>

#include "shuffle/cuda/staged.h"

namespace fusco::bench::gpu {

namespace {
constexpr int kPlannings = 20;  // replayed in one launch: planning is short beside the begin of a graph
}

struct Measurer::Contender {
  std::string name;
  std::unique_ptr<Shuffle> shuffle;
  FuscoShuffle* fusco = nullptr;
  std::unique_ptr<Replay> replay, planReplay;  // gone before the shuffle whose memory they use
  std::vector<double> us, planUs;
  std::uint64_t wrong = 0;
  bool checked = false, dead = false;
  std::vector<std::pair<std::string, double>> figures;
};

Measurer::Measurer(World& world, const Options& options, Watchdog& watchdog, std::vector<std::string> impls,
                   std::shared_ptr<Nccl> nccl)
    : world_(world), options_(options), watchdog_(watchdog), impls_(std::move(impls)), nccl_(std::move(nccl)) {}

bool Measurer::wants(const std::string& impl) const {
  return std::find(impls_.begin(), impls_.end(), impl) != impls_.end();
}

std::shared_ptr<Communicators> Measurer::communicators(int sms) {
  if (communicators_ == nullptr || sms_ != sms) {
    communicators_.reset();
    communicators_ = openFusco(world_, options_, sms);
    sms_ = sms;
  }
  return communicators_;
}

void Measurer::add(std::vector<Contender>& all, const std::string& name, CaseResult& result,
                   const std::function<std::unique_ptr<Shuffle>()>& make) {
  watchdog_.step(fmt::format("preparing {}", name));
  try {
    Contender contender;
    contender.name = name;
    contender.shuffle = make();
    contender.fusco = dynamic_cast<FuscoShuffle*>(contender.shuffle.get());
    world_.synchronize();
    all.push_back(std::move(contender));
  } catch (const std::exception& error) {
    result.remarks.push_back(fmt::format("{} could not be prepared: {}", name, error.what()));
    result.failed = true;
  }
}

void Measurer::capture(Contender& contender) {
  if (!options_.graph || !contender.shuffle->capturable()) return;
  if (contender.fusco != nullptr)
    contender.planReplay = std::make_unique<Replay>(
        world_.lead(), [&] { contender.fusco->enqueuePlans(1); }, std::max(options_.iterations, kPlannings));
  contender.replay = std::make_unique<Replay>(
      world_.lead(), [&] { contender.shuffle->enqueue(1); }, options_.iterations);
}

void Measurer::once(Contender& contender) {
  if (contender.planReplay) contender.planReplay->launchOne(world_.lead());
  if (contender.replay)
    contender.replay->launchOne(world_.lead());
  else
    contender.shuffle->enqueue(1);
  world_.synchronize();
}

double Measurer::sample(Contender& contender) {
  if (!contender.replay) {
    if (options_.warmup > 0) contender.shuffle->enqueue(options_.warmup);
    world_.synchronize();
    return timeOf(
        world_, [&](int times) { contender.shuffle->enqueue(times); }, options_.iterations);
  }
  for (int i = 0; i < std::min(options_.warmup, 1); ++i) contender.replay->launch(world_.lead());
  world_.synchronize();
  return timeOf(
      world_, [&](int) { contender.replay->launch(world_.lead()); }, contender.replay->times());
}

std::uint64_t Measurer::check(Contender& contender, Tensors& tensors, const ShuffleMap& second) {
  const auto with = [&](bool spoil) {
    // Data that no run before has had: what an earlier one left behind is wrong now.
    const std::uint64_t seed = options_.seed * 1000003 + ++checks_;
    tensors.refill(seed);
    once(contender);
    if (spoil) tensors.spoil();
    return tensors.wrong(seed, contender.shuffle->bringsScales());
  };
  std::uint64_t wrong = with(options_.corrupt == contender.name);
  if (contender.planReplay == nullptr) return wrong;
  const ShuffleMap& first = tensors.map();
  tensors.use(second);
  wrong += with(false);
  tensors.use(first);
  // The timed replays shuffle the first routing map again.
  once(contender);
  return wrong;
}

void Measurer::measureAll(std::vector<Contender>& all, Tensors& tensors, const ShuffleMap& second, CaseResult& result) {
  const auto guarded = [&](Contender& contender, const char* doing, const std::function<void()>& work) {
    if (contender.dead) return;
    watchdog_.step(fmt::format("{} {}", doing, contender.name));
    try {
      work();
    } catch (const std::exception& error) {
      contender.dead = true;
      result.failed = true;
      result.remarks.push_back(fmt::format("{} failed while {} it: {}", contender.name, doing, error.what()));
    }
  };
  const auto checkAll = [&] {
    for (Contender& contender : all) {
      if (!options_.check || contender.name == "copy") continue;
      guarded(contender, "checking", [&] {
        contender.wrong += contender.name == "limit" && world_.gpus() > 1 ? wrongInPeerCopy(*contender.shuffle)
                                                                          : check(contender, tensors, second);
        contender.checked = true;
      });
    }
  };
  for (Contender& contender : all) guarded(contender, "capturing", [&] { capture(contender); });
  checkAll();
  for (int round = 0; round < options_.rounds; ++round)
    for (std::size_t i = 0; i < all.size(); ++i) {
      Contender& contender = all[(i + static_cast<std::size_t>(round)) % all.size()];
      guarded(contender, "timing", [&] { contender.us.push_back(sample(contender)); });
    }
  checkAll();
  for (Contender& contender : all) {
    guarded(contender, "timing parts of", [&] {
      contender.figures = contender.shuffle->parts();
      if (contender.fusco == nullptr || (options_.planOnce && !options_.graph)) return;
      for (int round = 0; round < options_.rounds; ++round) {
        contender.planUs.push_back(timeOf(
            world_,
            [&](int times) {
              if (contender.planReplay)
                contender.planReplay->launch(world_.lead());
              else
                contender.fusco->enqueuePlans(times);
            },
            contender.planReplay ? contender.planReplay->times() : options_.iterations));
      }
    });
  }
}

Row Measurer::rowOf(const Contender& contender, const CaseContext& context, const CaseSize& size) const {
  Row row;
  row.impl = contender.name;
  row.which = context.which;
  row.bytes = size.bytes;
  row.count = size.count;
  row.p50Us = percentile(contender.us, 0.5);
  row.p99Us = percentile(contender.us, 0.99);
  row.roundP50Us = contender.us;
  row.algbw = row.p50Us > 0 ? static_cast<double>(size.bytes) / row.p50Us / 1e3 : 0;
  row.busbw = row.algbw * size.remoteShare;
  row.wrong = contender.wrong;
  row.checked = contender.checked;
  row.planUs = contender.planUs.empty() ? 0 : percentile(contender.planUs, 0.5);
  row.writeGbps = row.p50Us > 0 ? static_cast<double>(size.writtenBytes) / row.p50Us / 1e3 : 0;
  row.readGbps = row.p50Us > 0 ? static_cast<double>(size.readBytes) / row.p50Us / 1e3 : 0;
  for (const auto& [name, value] : contender.figures) row.figures.emplace_back(name + "_us", value);
  row.remark = contender.shuffle->remark();
  if (contender.replay)
    row.remark += contender.replay->oneLaunch() ? "; replayed in one launch" : "; replayed by a launch each";
  return row;
}

CaseResult Measurer::measure(const CaseContext& context, const ShuffleMap& second) {
  CaseResult result;
  const Op op = context.which.op;
  const std::vector<const ShuffleMap*> maps{&context.map, &second};
  const std::size_t needed = Tensors::bytesNeeded(options_, maps, world_.gpus(), options_.graph);
  if (static_cast<double>(needed) > 0.9 * static_cast<double>(world_.freeBytes(0))) {
    result.remarks.push_back(fmt::format(
        "{} of {} tokens left out: its tensors need {:.1f} GB of a GPU and {:.1f} GB are free", nameOf(op),
        context.which.tokens, static_cast<double>(needed) / 1e9, static_cast<double>(world_.freeBytes(0)) / 1e9));
    return result;
  }
  const CaseSize size = sizeOf(context, {});
  watchdog_.step("making tensors");
  Tensors tensors(world_, options_, op, maps, options_.graph);
  tensors.refill(options_.seed);
  const bool oneGpu = world_.gpus() == 1;

  std::vector<Contender> all;
  add(all, "limit", result, [&]() -> std::unique_ptr<Shuffle> {
    return oneGpu ? makeOnePass(world_, tensors, options_) : makePeerCopy(world_, tensors);
  });
  if (oneGpu) add(all, "copy", result, [&] { return makeDeviceCopy(world_, tensors); });
  if (wants("fusco"))
    add(all, "fusco", result, [&] { return makeFusco(world_, tensors, options_, communicators(context.which.sms)); });
  for (const char* name : {"staged", "nccl"}) {
    const bool nccl = std::string(name) == "nccl";
    if (!wants(name) || (nccl && nccl_ == nullptr)) continue;
    if (options_.scales && op == Op::dispatch) {
      result.remarks.push_back(fmt::format("{} left out: it brings one tensor (--scales)", name));
      continue;
    }
    const std::size_t more = Stages::bytesNeeded(tensors, world_, context.map.topk);
    if (static_cast<double>(more) > 0.95 * static_cast<double>(world_.freeBytes(0))) {
      result.remarks.push_back(fmt::format("{} left out: its packed rows need {:.1f} GB more of a GPU", name,
                                           static_cast<double>(more) / 1e9));
      continue;
    }
    add(all, name, result,
        [&] { return nccl ? makeNccl(world_, tensors, options_, nccl_) : makeStaged(world_, tensors, options_); });
  }
  measureAll(all, tensors, second, result);

  for (const Contender& contender : all)
    if (!contender.dead && !contender.us.empty()) result.rows.push_back(rowOf(contender, context, size));
  const auto limit =
      std::find_if(result.rows.begin(), result.rows.end(), [](const Row& row) { return row.impl == "limit"; });
  const double limitUs = limit == result.rows.end() ? 0 : limit->p50Us,
               limitBw = limit == result.rows.end() ? 0 : limit->algbw;
  for (Row& row : result.rows) {
    const auto& shuffle = *std::find_if(all.begin(), all.end(), [&](const Contender& c) { return c.name == row.impl; });
    if (row.impl == "copy") {
      // Its bytes are its own; what counts is how long (1 + K) T h bytes would take at its rate.
      const double gbps =
          row.p50Us > 0 ? static_cast<double>(bytesOfDeviceCopy(*shuffle.shuffle)) / row.p50Us / 1e3 : 0;
      row.p50Us = gbps > 0 ? static_cast<double>(size.readBytes + size.writtenBytes) / gbps / 1e3 : 0;
      row.p99Us = row.algbw = row.busbw = row.readGbps = row.writeGbps = 0;
      row.figures.emplace_back("copy_gbps", gbps);
      row.remark = "p50: the shuffle's bytes, read and written, at the rate of a device copy";
    } else {
      if (op == Op::dispatch) row.figures.emplace_back("written_gbps", row.writeGbps);
      if (row.impl == "limit" && !oneGpu)
        row.figures.emplace_back("link_gbps",
                                 static_cast<double>(busiestLinkBytes(*shuffle.shuffle)) / row.p50Us / 1e3);
    }
    row.limit = limitBw;
    row.ofLimit = row.p50Us > 0 ? limitUs / row.p50Us : 0;
    result.failed = result.failed || row.wrong > 0;
  }
  return result;
}

}  // namespace fusco::bench::gpu
