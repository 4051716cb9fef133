// Plans, dispatch and combine.
#include "engine/shuffle.h"

#include <fmt/format.h>

#include <cstdio>
#include <cstring>
#include <fstream>

#include "api/group.h"
#include "api/state.h"
#include "base/environment.h"
#include "plan/file.h"
#include "plan/print.h"

using namespace fusco;
using namespace fusco::api;

static_assert(sizeof(fuscoTicket_t) == sizeof(engine::Ticket) &&
              offsetof(fuscoTicket_t, primary) == offsetof(engine::Ticket, primary));

namespace {

void require(bool condition, const std::string& text) {
  if (!condition) fail(Code::invalidArgument, text);
}

// Copies a caller's struct, which may be older and shorter, over defaults.
template <class T>
T copyStruct(const char* name, const T* given, T defaults, unsigned magic) {
  require(given != nullptr, fmt::format("{} is NULL", name));
  checkStruct(name, given->size, given->magic, sizeof(T), magic);
  std::memcpy(&defaults, given, given->size);
  defaults.size = sizeof(T);
  return defaults;
}

engine::PlanRequest planRequest(const fuscoPlanConfig_t& c) {
  require(c.idType == fuscoInt32 || c.idType == fuscoInt64, "expertIds are fuscoInt32 or fuscoInt64");
  require(c.tokens >= 0, fmt::format("tokens is {}, must not be negative", c.tokens));
  require(c.topk >= 1 && c.topk <= 32767, fmt::format("topk is {}, must be 1 to 32767", c.topk));
  require(c.tokens <= INT32_MAX / c.topk,
          fmt::format("{} tokens x top-{} are more than 2^31 - 1 rows", c.tokens, c.topk));
  require(c.capacityRows <= INT32_MAX, fmt::format("capacityRows is {}, more than 2^31 - 1", c.capacityRows));
  require(c.experts >= 1, fmt::format("experts is {}, must be at least 1", c.experts));
  require(c.tokens == 0 || c.expertIds != nullptr, fmt::format("expertIds is NULL and tokens is {}", c.tokens));
  require(c.layout >= 0 && c.layout <= 2, fmt::format("layout {} does not exist", c.layout));
  require(c.alignment >= 1, fmt::format("alignment is {}, must be at least 1", c.alignment));
  require(c.alignment == 1 || c.layout == fuscoLayoutExpertOrder, "alignment goes with the expert-order layout only");
  require(c.capacityRows >= 0, fmt::format("capacityRows is {}, must not be negative", c.capacityRows));
  require(c.capacityPolicy == fuscoCapacityError || c.capacityPolicy == fuscoCapacityDrop,
          fmt::format("capacityPolicy {} does not exist", c.capacityPolicy));
  require(c.dedup >= 0 && c.dedup <= 3, fmt::format("dedup {} does not exist", c.dedup));
  require(c.layout != fuscoLayoutSlotted || c.maxTokens >= 1,
          "the slotted layout needs maxTokens, the most tokens that any rank brings");
  require(c.layout != fuscoLayoutSlotted || c.tokens <= c.maxTokens,
          fmt::format("tokens is {}, maxTokens {}", c.tokens, c.maxTokens));
  engine::PlanRequest r;
  r.map.ids = c.expertIds;
  r.map.idBytes = c.idType == fuscoInt32 ? 4 : 8;
  r.map.weights = c.weights;
  r.map.tokens = c.tokens;
  r.map.topk = c.topk;
  r.map.experts = c.experts;
  r.options.layout = static_cast<plan::Layout>(c.layout);
  r.options.alignment = c.alignment;
  r.options.maxTokens = c.layout == fuscoLayoutSlotted ? c.maxTokens : 0;
  r.options.capacityRows = c.capacityRows;
  int dedup = c.dedup;
  if (dedup == fuscoDedupAuto) dedup = static_cast<int>(environment().number(Setting::dedup));
  r.dedupAuto = dedup == fuscoDedupAuto;
  r.options.dedup = r.dedupAuto ? plan::Dedup::node : static_cast<plan::Dedup>(dedup);
  r.dropBeyondCapacity = c.capacityPolicy == fuscoCapacityDrop;
  r.zeroFill = c.zeroFill != 0;
  r.counters = c.expertCounters != 0;
  r.tickets = c.tickets != 0;
  r.tokensOnDevice = c.tokensOnDevice;
  return r;
}

// Memory of a call that is read or written.
struct Range {
  const char* name;
  const void* begin;
  std::size_t rows;
  std::size_t rowBytes;
  std::uintptr_t at() const { return reinterpret_cast<std::uintptr_t>(begin); }
  std::uintptr_t end() const { return at() + rows * rowBytes; }
};

// What is written may overlap nothing else; `written` come first.
void requireApart(std::initializer_list<Range> ranges, std::size_t written) {
  for (const Range& r : ranges) {
    require(r.rows == 0 || r.rowBytes <= (std::size_t{1} << 62) / r.rows,
            fmt::format("{}: {} x {} bytes overflow", r.name, r.rows, r.rowBytes));
  }
  for (std::size_t i = 0; i < written; ++i) {
    for (std::size_t j = i + 1; j < ranges.size(); ++j) {
      const Range& a = ranges.begin()[i];
      const Range& b = ranges.begin()[j];
      if (a.at() == a.end() || b.at() == b.end()) continue;
      require(a.end() <= b.at() || b.end() <= a.at(), fmt::format("{} and {} overlap", b.name, a.name));
    }
  }
}

engine::DispatchRequest dispatchRequest(const PlanHandleState& p, const fuscoDispatchArgs_t& a) {
  const plan::ArenaHeader& h = *p.plan->view.header;
  require(a.rowBytes >= 1, "rowBytes is 0");
  require(a.rowBytes <= (std::size_t{1} << 40), fmt::format("rowBytes is {}, more than 2^40", a.rowBytes));
  require(a.input != nullptr || h.tokensUsed == 0,
          fmt::format("input is NULL and the plan has {} tokens", h.tokensUsed));
  require(a.output != nullptr || h.receiveRows == 0,
          fmt::format("output is NULL and {} rows will arrive", h.receiveRows));
  require(a.cast == fuscoCastNone || a.cast == fuscoCastBf16ToFp8e4m3, fmt::format("cast {} does not exist", a.cast));
  engine::DispatchRequest r;
  r.input = static_cast<const std::byte*>(a.input);
  r.output = static_cast<std::byte*>(a.output);
  r.rowBytes = a.rowBytes;
  if (a.cast == fuscoCastBf16ToFp8e4m3) {
    require(
        a.rowBytes % 256 == 0,
        fmt::format("rowBytes is {}: a cast needs BF16 rows of a multiple of 128 elements (256 bytes)", a.rowBytes));
    require(a.outputScales != nullptr || h.receiveRows == 0, "outputScales is NULL");
    require(a.rowBytes2 == 0, "a cast makes its scales itself: rowBytes2 must be 0");
    r.castToFp8 = true;
    r.outputScales = reinterpret_cast<std::byte*>(a.outputScales);
  } else if (a.rowBytes2 > 0) {
    require(a.rowBytes2 <= (std::size_t{1} << 40), fmt::format("rowBytes2 is {}, more than 2^40", a.rowBytes2));
    require(a.input2 != nullptr || h.tokensUsed == 0, "input2 is NULL");
    require(a.output2 != nullptr || h.receiveRows == 0, "output2 is NULL");
    r.input2 = static_cast<const std::byte*>(a.input2);
    r.output2 = static_cast<std::byte*>(a.output2);
    r.rowBytes2 = a.rowBytes2;
  }
  const auto in = static_cast<std::size_t>(h.tokensUsed);
  const auto out = static_cast<std::size_t>(h.receiveRows);
  requireApart({{"output", r.output, out, r.castToFp8 ? r.rowBytes / 2 : r.rowBytes},
                {"output2", r.output2, out, r.rowBytes2},
                {"outputScales", r.outputScales, out, r.castToFp8 ? r.rowBytes / 256 * 4 : 0},
                {"input", r.input, in, r.rowBytes},
                {"input2", r.input2, in, r.rowBytes2}},
               3);
  return r;
}

exec::RowType rowType(fuscoDataType_t type) {
  switch (type) {
    case fuscoBfloat16:
      return exec::RowType::bf16;
    case fuscoFloat16:
      return exec::RowType::f16;
    case fuscoFloat32:
      return exec::RowType::f32;
    default:
      fail(Code::invalidArgument,
           fmt::format("data type {} cannot be summed: fuscoBfloat16, fuscoFloat16 or fuscoFloat32",
                       static_cast<int>(type)));
  }
}

engine::CombineRequest combineRequest(const PlanHandleState& p, const fuscoCombineArgs_t& a) {
  const plan::ArenaHeader& h = *p.plan->view.header;
  if (p.comm->engine->topology().nodes() > 1 && !p.plan->dispatched) {
    fail(Code::invalidUsage,
         fmt::format(
             "rank {}: combine before the first dispatch of its plan has finished: on several nodes the way back "
             "follows what dispatch brought; dispatch first",
             p.comm->rank));
  }
  require(a.elements >= 1, "elements is 0");
  require(a.elements <= (std::size_t{1} << 38), fmt::format("elements is {}, more than 2^38", a.elements));
  require(a.input != nullptr || h.receiveRows == 0,
          fmt::format("input is NULL and the plan has {} expert rows here", h.receiveRows));
  require(a.output != nullptr || h.tokensUsed == 0,
          fmt::format("output is NULL and the plan has {} tokens", h.tokensUsed));
  engine::CombineRequest r;
  r.input = static_cast<const std::byte*>(a.input);
  r.output = static_cast<std::byte*>(a.output);
  r.elements = a.elements;
  r.type = rowType(a.datatype);
  r.bias = static_cast<const std::byte*>(a.bias);
  r.weighted = a.weighted != 0;
  r.partialsFp32 = a.partialsFp32 != 0;
  const std::size_t rowBytes = a.elements * exec::elementBytes(r.type);
  const auto tokens = static_cast<std::size_t>(h.tokensUsed);
  // The bias may be the output: each of its elements is read before its sum is written.
  requireApart(
      {{"output", r.output, tokens, rowBytes}, {"input", r.input, static_cast<std::size_t>(h.receiveRows), rowBytes}},
      1);
  return r;
}

std::shared_ptr<PlanHandleState> usablePlan(fuscoPlan_t plan) {
  auto state = findPlan(plan);
  state->comm->engine->checkUsable();
  if (state->comm->gpu >= 0) engine::checkPlanned(*state->plan);
  return state;
}

bool onGpu(const PlanHandleState& p) { return p.comm->gpu >= 0; }

std::unique_ptr<engine::Operation> makeDispatch(const PlanHandleState& p, const engine::DispatchRequest& request,
                                                cudaStream_t stream) {
  if (!onGpu(p)) return engine::makeDispatch(*p.comm->engine, p.plan, request);
  return engine::makeDeviceDispatch(*p.comm->engine, p.plan, request, stream);
}

std::unique_ptr<engine::Operation> makeCombine(const PlanHandleState& p, const engine::CombineRequest& request,
                                               cudaStream_t stream) {
  if (!onGpu(p)) return engine::makeCombine(*p.comm->engine, p.plan, request);
  return engine::makeDeviceCombine(*p.comm->engine, p.plan, request, stream);
}

void runOne(const std::shared_ptr<CommState>& comm, std::unique_ptr<engine::Operation> operation) {
  asGroup([&] { enqueue(comm, std::move(operation)); });
}

void start(const std::shared_ptr<CommState>& comm, std::unique_ptr<engine::Operation> operation) {
  if (inGroup()) fail(Code::invalidUsage, "a started operation cannot be part of a group");
  comm->engine->submit(std::move(operation), true);
}

void checkStartable(const CommState& comm) {
  if (comm.engine->startedOperations() >= engine::kOperationSlots) {
    fail(Code::invalidUsage, fmt::format("rank {}: {} operations are under way already; call fuscoFinish first",
                                         comm.rank, engine::kOperationSlots));
  }
}

}  // namespace

fuscoResult_t fuscoPlanCreate(fuscoPlan_t* plan, const fuscoPlanConfig_t* config, fuscoComm_t comm,
                              cudaStream_t stream) {
  return guarded("fuscoPlanCreate", [&] {
    require(plan != nullptr, "plan is NULL");
    *plan = nullptr;
    const auto state = findComm(comm);
    const fuscoPlanConfig_t c =
        copyStruct("fuscoPlanConfig_t", config, fuscoPlanConfig_t FUSCO_PLAN_CONFIG_INIT, FUSCO_PLAN_MAGIC);
    auto made = std::make_shared<PlanHandleState>();
    made->comm = state;
    const engine::PlanRequest request = planRequest(c);
    require(request.tokensOnDevice == nullptr || state->gpu >= 0,
            "tokensOnDevice goes with communicators on GPUs only");
    made->plan = std::make_shared<engine::PlanState>(*state->engine, request);
    auto planning = state->gpu >= 0 ? engine::makeDevicePlanning(*state->engine, made->plan, stream)
                                    : engine::makePlanning(*state->engine, made->plan);
    asGroup([&] {
      enqueue(state, std::move(planning), [plan, made] {
        ++made->comm->plans;
        *plan = addPlan(made);
      });
    });
  });
}

fuscoResult_t fuscoPlanDestroy(fuscoPlan_t plan) {
  return guarded("fuscoPlanDestroy", [&] { --removePlan(plan)->comm->plans; });
}

fuscoResult_t fuscoPlanGetInfo(fuscoPlan_t plan, fuscoPlanInfo_t* info) {
  return guarded("fuscoPlanGetInfo", [&] {
    require(info != nullptr, "info is NULL");
    checkStruct("fuscoPlanInfo_t", info->size, info->magic, sizeof *info, FUSCO_PLAN_INFO_MAGIC);
    const auto state = findPlan(plan);
    const engine::PlanState& p = *state->plan;
    const plan::ArenaHeader& h = *p.view.header;
    fuscoPlanInfo_t out = FUSCO_PLAN_INFO_INIT;
    out.tokens = h.tokensUsed;
    out.receiveRows = h.receiveRows;
    out.droppedRows = h.dropped;
    out.localExperts = h.localExperts;
    out.firstExpert = state->comm->engine->topology().firstExpert(state->comm->rank, h.experts);
    const plan::Flow& own = p.view.flows[p.streams().ownFlow];
    out.copiesLocal = own.copyEnd - own.copyBegin;
    out.copiesRemote = h.copies - out.copiesLocal;
    out.localExpertRows = p.localExpertRows.data();
    out.localExpertStart = p.view.localExpertStart;
    const std::size_t size = info->size;
    std::memcpy(info, &out, size);
    info->size = size;
  });
}

fuscoResult_t fuscoPlanGetDeviceInfo(fuscoPlan_t plan, fuscoPlanDeviceInfo_t* info) {
  return guarded("fuscoPlanGetDeviceInfo", [&] {
    require(info != nullptr, "info is NULL");
    checkStruct("fuscoPlanDeviceInfo_t", info->size, info->magic, sizeof *info, FUSCO_PLAN_DEVICE_INFO_MAGIC);
    const auto state = findPlan(plan);
    if (!onGpu(*state)) fail(Code::invalidUsage, "the plan's communicator is on the host; see fuscoPlanGetInfo");
    const engine::DeviceCounts counts = engine::deviceCounts(*state->plan);
    fuscoPlanDeviceInfo_t out = FUSCO_PLAN_DEVICE_INFO_INIT;
    out.localExpertRows = counts.localExpertRows;
    out.localExpertStart = counts.localExpertStart;
    out.droppedRows = counts.dropped;
    out.receiveRows = counts.receiveRows;
    const std::size_t size = info->size;
    std::memcpy(info, &out, size);
    info->size = size;
  });
}

fuscoResult_t fuscoPlanExpertCounters(fuscoPlan_t plan, const volatile uint64_t** counters) {
  return guarded("fuscoPlanExpertCounters", [&] {
    require(counters != nullptr, "counters is NULL");
    const auto state = findPlan(plan);
    const engine::PlanState& p = *state->plan;
    const std::uint64_t* there = nullptr;
    if (onGpu(*state)) {
      there = engine::deviceBeside(p).counters;
    } else if (p.counters.data() != nullptr) {
      there = p.counters.as<engine::CounterBoard>()->counters();
    }
    if (there == nullptr) fail(Code::invalidUsage, "the plan was made without expertCounters = 1 (or in rank order)");
    *counters = there;
  });
}

fuscoResult_t fuscoPlanTickets(fuscoPlan_t plan, const fuscoTicket_t** tickets) {
  return guarded("fuscoPlanTickets", [&] {
    require(tickets != nullptr, "tickets is NULL");
    const auto state = findPlan(plan);
    const engine::PlanState& p = *state->plan;
    const engine::Ticket* there =
        onGpu(*state) ? engine::deviceBeside(p).tickets : p.tickets.as<const engine::Ticket>();
    if (there == nullptr) fail(Code::invalidUsage, "the plan was made without tickets = 1");
    if (!state->plan->dispatched)
      fail(Code::invalidUsage, "tickets are filled by the plan's first dispatch, which has not run");
    *tickets = reinterpret_cast<const fuscoTicket_t*>(there);
  });
}

fuscoResult_t fuscoPlanRankOrder(fuscoPlan_t plan, const int32_t** localExpertIds, const float** weights) {
  return guarded("fuscoPlanRankOrder", [&] {
    require(localExpertIds != nullptr && weights != nullptr, "localExpertIds or weights is NULL");
    const auto state = findPlan(plan);
    if (state->plan->request.options.layout != plan::Layout::rankOrder)
      fail(Code::invalidUsage, "the plan's layout is not rank order");
    if (!state->plan->dispatched)
      fail(Code::invalidUsage, "they are filled by the plan's first dispatch, which has not run");
    if (onGpu(*state)) {
      const engine::DeviceBesideView there = engine::deviceBeside(*state->plan);
      *localExpertIds = there.localIds;
      *weights = there.weights;
      return;
    }
    *localExpertIds = state->plan->rankOrderIds.as<std::int32_t>();
    *weights = state->plan->rankOrderWeights.as<float>();
  });
}

fuscoResult_t fuscoPlanPrint(fuscoPlan_t plan, int json, char* buffer, size_t bytes, size_t* needed) {
  return guarded("fuscoPlanPrint", [&] {
    require(buffer != nullptr || bytes == 0, "buffer is NULL");
    const auto state = findPlan(plan);
    const std::vector<std::byte> brought = onGpu(*state) ? engine::bringArena(*state->plan) : std::vector<std::byte>();
    const void* arena = onGpu(*state) ? brought.data() : state->plan->arena.data();
    const std::string text = json != 0 ? plan::printJson(arena) : plan::printText(arena);
    if (needed != nullptr) *needed = text.size() + 1;
    if (bytes > 0) std::snprintf(buffer, bytes, "%s", text.c_str());
  });
}

fuscoResult_t fuscoPlanSave(fuscoPlan_t plan, const char* path) {
  return guarded("fuscoPlanSave", [&] {
    require(path != nullptr, "path is NULL");
    const auto state = findPlan(plan);
    const engine::PlanState& p = *state->plan;
    const engine::BroughtPlan brought = onGpu(*state) ? engine::bringPlan(p) : engine::BroughtPlan{};
    std::ofstream file(path, std::ios::binary);
    if (!file) failErrno(fmt::format("cannot write the plan to {}", path));
    plan::save(plan::record(onGpu(*state) ? brought.map : p.kept(), p.topology(), state->comm->rank, p.request.options,
                            onGpu(*state) ? brought.exchanged : p.exchanged),
               file);
    file.close();
    if (!file) failErrno(fmt::format("cannot write the plan to {}", path));
  });
}

fuscoResult_t fuscoDispatchEx(fuscoPlan_t plan, const fuscoDispatchArgs_t* args, cudaStream_t stream) {
  return guarded("fuscoDispatch", [&] {
    const auto p = usablePlan(plan);
    const auto a =
        copyStruct("fuscoDispatchArgs_t", args, fuscoDispatchArgs_t FUSCO_DISPATCH_INIT, FUSCO_DISPATCH_MAGIC);
    runOne(p->comm, makeDispatch(*p, dispatchRequest(*p, a), stream));
  });
}

fuscoResult_t fuscoDispatch(fuscoPlan_t plan, const void* input, void* output, size_t rowBytes, cudaStream_t stream) {
  fuscoDispatchArgs_t args = FUSCO_DISPATCH_INIT;
  args.input = input;
  args.output = output;
  args.rowBytes = rowBytes;
  return fuscoDispatchEx(plan, &args, stream);
}

fuscoResult_t fuscoCombineEx(fuscoPlan_t plan, const fuscoCombineArgs_t* args, cudaStream_t stream) {
  return guarded("fuscoCombine", [&] {
    const auto p = usablePlan(plan);
    const auto a = copyStruct("fuscoCombineArgs_t", args, fuscoCombineArgs_t FUSCO_COMBINE_INIT, FUSCO_COMBINE_MAGIC);
    runOne(p->comm, makeCombine(*p, combineRequest(*p, a), stream));
  });
}

fuscoResult_t fuscoCombine(fuscoPlan_t plan, const void* input, void* output, size_t elements, fuscoDataType_t datatype,
                           cudaStream_t stream) {
  fuscoCombineArgs_t args = FUSCO_COMBINE_INIT;
  args.input = input;
  args.output = output;
  args.elements = elements;
  args.datatype = datatype;
  return fuscoCombineEx(plan, &args, stream);
}

fuscoResult_t fuscoCombineBackward(fuscoPlan_t plan, const fuscoCombineBackwardArgs_t* args, cudaStream_t stream) {
  return guarded("fuscoCombineBackward", [&] {
    const auto p = usablePlan(plan);
    const auto a = copyStruct("fuscoCombineBackwardArgs_t", args,
                              fuscoCombineBackwardArgs_t FUSCO_COMBINE_BACKWARD_INIT, FUSCO_COMBINE_BACKWARD_MAGIC);
    const plan::ArenaHeader& h = *p->plan->view.header;
    if (p->plan->request.options.layout == plan::Layout::rankOrder) {
      fail(Code::invalidUsage, "the rank-order layout has plain sums: the backward of its combine is a dispatch");
    }
    require(a.elements >= 1 && a.elements <= (std::size_t{1} << 38), fmt::format("elements is {}", a.elements));
    require((a.outputGradient != nullptr && a.weightGradient != nullptr) || h.tokensUsed == 0,
            "outputGradient or weightGradient is NULL");
    require((a.expertRows != nullptr && a.inputGradient != nullptr) || h.receiveRows == 0,
            "expertRows or inputGradient is NULL");
    engine::CombineBackwardRequest r;
    r.outputGradient = static_cast<const std::byte*>(a.outputGradient);
    r.expertRows = static_cast<const std::byte*>(a.expertRows);
    r.inputGradient = static_cast<std::byte*>(a.inputGradient);
    r.weightGradient = a.weightGradient;
    r.elements = a.elements;
    r.type = rowType(a.datatype);
    const std::size_t rowBytes = a.elements * exec::elementBytes(r.type);
    const auto tokens = static_cast<std::size_t>(h.tokensUsed);
    const auto rows = static_cast<std::size_t>(h.receiveRows);
    requireApart({{"inputGradient", r.inputGradient, rows, rowBytes},
                  {"weightGradient", r.weightGradient, tokens, static_cast<std::size_t>(h.topk) * 4},
                  {"outputGradient", r.outputGradient, tokens, rowBytes},
                  {"expertRows", r.expertRows, rows, rowBytes}},
                 2);
    runOne(p->comm, onGpu(*p) ? engine::makeDeviceBackward(*p->comm->engine, p->plan, r, stream)
                              : engine::makeCombineBackward(*p->comm->engine, p->plan, r));
  });
}

fuscoResult_t fuscoDispatchStart(fuscoPlan_t plan, const fuscoDispatchArgs_t* args, cudaStream_t stream) {
  return guarded("fuscoDispatchStart", [&] {
    const auto p = usablePlan(plan);
    checkStartable(*p->comm);
    const auto a =
        copyStruct("fuscoDispatchArgs_t", args, fuscoDispatchArgs_t FUSCO_DISPATCH_INIT, FUSCO_DISPATCH_MAGIC);
    start(p->comm, makeDispatch(*p, dispatchRequest(*p, a), stream));
  });
}

fuscoResult_t fuscoCombineStart(fuscoPlan_t plan, const fuscoCombineArgs_t* args, cudaStream_t stream) {
  return guarded("fuscoCombineStart", [&] {
    const auto p = usablePlan(plan);
    checkStartable(*p->comm);
    const auto a = copyStruct("fuscoCombineArgs_t", args, fuscoCombineArgs_t FUSCO_COMBINE_INIT, FUSCO_COMBINE_MAGIC);
    start(p->comm, makeCombine(*p, combineRequest(*p, a), stream));
  });
}

fuscoResult_t fuscoFinish(fuscoPlan_t plan) {
  return guarded("fuscoFinish", [&] { findPlan(plan)->comm->engine->finishOldest(); });
}

fuscoResult_t fuscoWorkspaceSize(const fuscoConfig_t* config, const fuscoPlanConfig_t* plan, int nranks, int nodes,
                                 size_t rowBytes, int64_t privateRows, size_t* bytes) {
  return guarded("fuscoWorkspaceSize", [&] {
    require(bytes != nullptr, "bytes is NULL");
    const fuscoConfig_t c = resolveConfig(config);
    fuscoPlanConfig_t p =
        copyStruct("fuscoPlanConfig_t", plan, fuscoPlanConfig_t FUSCO_PLAN_CONFIG_INIT, FUSCO_PLAN_MAGIC);
    require(nranks >= 1 && nodes >= 1 && nodes <= nranks, fmt::format("{} ranks on {} nodes", nranks, nodes));
    require(privateRows >= 0, "privateRows is negative");
    require(p.tokens >= 0 && p.topk >= 1 && p.tokens <= INT32_MAX / p.topk,
            fmt::format("{} tokens x top-{}", p.tokens, p.topk));
    static const char unread = 0;
    if (p.expertIds == nullptr) p.expertIds = &unread;
    engine::WorkspaceShape shape;
    shape.request = planRequest(p);
    shape.sliceBytes = c.sliceBytes;
    shape.slices = c.slices;
    shape.ranks = nranks;
    shape.nodes = nodes;
    shape.onGpu = c.device == fuscoDeviceCuda && nodes == 1;
    shape.rowBytes = rowBytes;
    shape.privateRows = privateRows;
    *bytes = engine::workspaceBytes(shape);
  });
}
