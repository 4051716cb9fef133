#include "exec/cuda_executor.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "base/log.h"
#include "base/status.h"

namespace fusco::exec {

namespace {
constexpr std::size_t kHalfBytes = std::size_t{1} << 20;
std::size_t rounded(std::size_t bytes) { return (bytes + 255) / 256 * 256; }

static_assert(sizeof(Term) == sizeof(kernels::Term) && offsetof(Term, weight) == offsetof(kernels::Term, weight) &&
              offsetof(Term, type) == offsetof(kernels::Term, type) &&
              static_cast<int>(RowType::bf16) == static_cast<int>(kernels::SumType::bf16) &&
              static_cast<int>(RowType::f16) == static_cast<int>(kernels::SumType::f16) &&
              static_cast<int>(RowType::f32) == static_cast<int>(kernels::SumType::f32));
}  // namespace

class CudaExecutor::CudaPassage final : public Passage {
 public:
  explicit CudaPassage(CudaExecutor& executor) : executor_(executor) {}
  void free() noexcept {
    executor_.releaseDevice(device_, deviceBytes_);
    executor_.releasePinned(pinned_, pinnedBytes_);
  }

  const std::byte* in(const std::byte* memory, std::size_t bytes) override {
    const cuda::OnDevice on(executor_.device_);
    open(nullptr, memory, bytes);
    if (kind_ == Kind::device) return memory;
    if (kind_ == Kind::ordinary) std::memcpy(pinned_, memory, bytes);
    executor_.copy(device_, kind_ == Kind::pinned ? memory : pinned_, bytes);
    return device_;
  }
  std::byte* out(std::byte* memory, std::size_t bytes) override {
    const cuda::OnDevice on(executor_.device_);
    open(memory, memory, bytes);
    return kind_ == Kind::device ? memory : device_;
  }
  void close() override {
    const cuda::OnDevice on(executor_.device_);
    if (out_ != nullptr && kind_ != Kind::device)
      executor_.copy(kind_ == Kind::pinned ? out_ : pinned_, device_, bytes_);
    ended_->record(executor_.stream_->get());
    closed_ = true;
  }
  bool done() override {
    if (!closed_) return true;
    if (!ended_->reached()) return false;
    if (out_ != nullptr && kind_ == Kind::ordinary) std::memcpy(out_, pinned_, bytes_);
    closed_ = false;
    return true;
  }

 private:
  void open(std::byte* out, const std::byte* memory, std::size_t bytes) {
    // Not asked whether it was done, or of an operation that has failed.
    if (closed_) cuda::synchronize(executor_.stream_->get());
    closed_ = false;
    if (ended_ == nullptr) ended_ = std::make_unique<cuda::Event>();
    kind_ = executor_.kindOf(memory);
    if (kind_ != Kind::device && deviceBytes_ < bytes) {
      executor_.fence();
      executor_.releaseDevice(device_, deviceBytes_);
      executor_.needDevice(device_, deviceBytes_, bytes);
    }
    if (kind_ == Kind::ordinary && pinnedBytes_ < bytes) {
      executor_.fence();
      executor_.releasePinned(pinned_, pinnedBytes_);
      executor_.needPinned(pinned_, pinnedBytes_, bytes);
    }
    out_ = out;
    bytes_ = bytes;
  }

  CudaExecutor& executor_;
  std::byte* device_ = nullptr;
  std::size_t deviceBytes_ = 0;
  std::byte* pinned_ = nullptr;  // for memory that is not
  std::size_t pinnedBytes_ = 0;
  std::unique_ptr<cuda::Event> ended_;
  std::byte* out_ = nullptr;  // where bytes go out to
  std::size_t bytes_ = 0;
  Kind kind_ = Kind::ordinary;
  bool closed_ = false;
};

// Room for the lists of one call; bring() before the call is launched.
class CudaExecutor::Lists {
 public:
  Lists(CudaExecutor& executor, std::size_t bytes) : executor_(executor), bytes_(rounded(bytes)) {
    if (executor.at_ + bytes_ > executor.halves_[executor.half_].deviceBytes) {
      Half& full = executor.halves_[executor.half_];
      if (full.used != nullptr && executor.at_ > 0) {
        full.used->record(executor.stream_->get());
        full.inUse = true;
      }
      executor.half_ = 1 - executor.half_;
      executor.at_ = 0;
      Half& next = executor.halves_[executor.half_];
      if (next.used == nullptr) next.used = std::make_unique<cuda::Event>();
      // Rarely: so many calls are ahead of the GPU.
      if (next.inUse && !next.used->reached()) cuda::synchronize(executor.stream_->get());
      next.inUse = false;
      if (next.deviceBytes < bytes_) {
        executor.releasePinned(next.pinned, next.pinnedBytes);
        executor.releaseDevice(next.device, next.deviceBytes);
        executor.needPinned(next.pinned, next.pinnedBytes, std::max(bytes_, kHalfBytes));
        executor.needDevice(next.device, next.deviceBytes, std::max(bytes_, kHalfBytes));
      }
    }
    const Half& half = executor.halves_[executor.half_];
    pinned_ = half.pinned + executor.at_;
    device_ = half.device + executor.at_;
    executor.at_ += bytes_;
  }
  // The next list: written by the host at `here`, read by the GPU at what is returned.
  template <class T>
  T* take(std::size_t count, T*& here) {
    here = reinterpret_cast<T*>(pinned_ + taken_);
    auto* there = reinterpret_cast<T*>(device_ + taken_);
    taken_ += (count * sizeof(T) + 15) / 16 * 16;
    return there;
  }
  template <class T>
  static std::size_t bytesOf(std::size_t count) {
    return (count * sizeof(T) + 15) / 16 * 16;
  }
  std::byte* device() const { return device_; }
  void bring() { executor_.copy(device_, pinned_, taken_); }

 private:
  CudaExecutor& executor_;
  const std::size_t bytes_;
  std::size_t taken_ = 0;
  std::byte* pinned_ = nullptr;
  std::byte* device_ = nullptr;
};

CudaExecutor::CudaExecutor(int device, int maxSms, std::atomic<std::uint64_t>& held)
    : device_(device), budget_{maxSms}, held_(held) {
  const cuda::OnDevice on(device_);
  stream_ = std::make_unique<cuda::OwnStream>();
}

CudaExecutor::~CudaExecutor() {
  try {
    const cuda::OnDevice on(device_);
    cuda::synchronize(stream_->get());
    for (auto& [number, passage] : passages_) passage->free();
    passages_.clear();
    for (Half& half : halves_) {
      half.used.reset();
      releasePinned(half.pinned, half.pinnedBytes);
      releaseDevice(half.device, half.deviceBytes);
    }
    for (const auto& [start, range] : adopted_) {
      if (range.kind == Kind::pinned) cuda::unpin(reinterpret_cast<void*>(start));
    }
    stream_.reset();
  } catch (const std::exception& e) {
    FUSCO_WARN("GPU memory of a communicator could not be freed: {}", e.what());
  }
}

void CudaExecutor::needDevice(std::byte*& memory, std::size_t& has, std::size_t bytes) {
  memory = static_cast<std::byte*>(cuda::allocate(rounded(bytes)));
  has = rounded(bytes);
  held_ += has;
}
void CudaExecutor::needPinned(std::byte*& memory, std::size_t& has, std::size_t bytes) {
  memory = static_cast<std::byte*>(cuda::allocatePinned(rounded(bytes)));
  has = rounded(bytes);
  held_ += has;
}
void CudaExecutor::releaseDevice(std::byte*& memory, std::size_t& has) noexcept {
  cuda::release(memory);
  held_ -= has;
  memory = nullptr;
  has = 0;
}
void CudaExecutor::releasePinned(std::byte*& memory, std::size_t& has) noexcept {
  cuda::releasePinned(memory);
  held_ -= has;
  memory = nullptr;
  has = 0;
}

const CudaExecutor::Range* CudaExecutor::rangeOf(const void* memory) const {
  const auto at = reinterpret_cast<std::uintptr_t>(memory);
  auto found = adopted_.upper_bound(at);
  if (found == adopted_.begin()) return nullptr;
  --found;
  return at < found->first + found->second.bytes ? &found->second : nullptr;
}

void CudaExecutor::adopt(void* memory, std::size_t bytes) {
  if (adopted(memory)) return;
  const cuda::OnDevice on(device_);
  Kind kind = Kind::device;
  if (cuda::whereIs(memory).place != cuda::Place::device) {
    kind = cuda::pin(memory, bytes) ? Kind::pinned : Kind::ordinary;
    if (kind == Kind::ordinary)
      FUSCO_INFO(kLogAlloc, "{} bytes of slots cannot be pinned: their payloads are copied by the CPU", bytes);
  }
  adopted_[reinterpret_cast<std::uintptr_t>(memory)] = {bytes, kind};
}

void CudaExecutor::copy(void* to, const void* from, std::size_t bytes) {
  if (bytes == 0) return;
  const cuda::OnDevice on(device_);
  cuda::copy(to, from, bytes, stream_->get());
}

void CudaExecutor::copyRows(const kernels::RowCopy& rows) {
  const cuda::OnDevice on(device_);
  cuda::copyRows(&rows, 1, budget_, stream_->get());
}

void CudaExecutor::fill(void* address, std::size_t bytes) {
  if (bytes == 0) return;
  const cuda::OnDevice on(device_);
  cuda::fill(address, 0, bytes, stream_->get());
}

void CudaExecutor::fence() {
  const cuda::OnDevice on(device_);
  cuda::synchronize(stream_->get());
}

Passage& CudaExecutor::passage(std::uint64_t number) {
  std::unique_ptr<CudaPassage>& passage = passages_[number];
  if (passage == nullptr) passage = std::make_unique<CudaPassage>(*this);
  return *passage;
}

namespace {

// A plan of one flow with these copies alone, as kernels read it; their numbering begins at 0.
struct SmallPlan {
  std::size_t copies, entries;
  std::uint32_t firstEntry;
};
SmallPlan smallPlan(const PlaceArgs& args) {
  const std::uint32_t first = args.copies[args.begin].firstEntry;
  return {args.end - args.begin, args.copies[args.end].firstEntry - first, first};
}

// Bases of the ranks that occur: the caller gives no number of them.
template <class Base>
void copyBases(const PlaceArgs& args, const SmallPlan& small, Base* const* from, Base** to) {
  if (from == nullptr) return;
  for (std::size_t e = 0; e < small.entries; ++e) {
    const plan::Entry& entry = args.entries[small.firstEntry + e];
    to[entry.rank] = from[entry.rank];
  }
}

}  // namespace

kernels::PlaceArgs CudaExecutor::placeArgs(const PlaceArgs& args, Lists& lists) {
  const SmallPlan small = smallPlan(args);
  kernels::PlaceArgs k{};
  k.rankCount = 1;
  k.maxTokens = static_cast<int>(small.copies);
  k.sourceStride = args.sourceStride;
  k.destinationStride = args.destinationStride;
  k.rowBytes = args.rowBytes;
  k.skipDuplicates = args.skipDuplicates;
  k.ranks[0].source = args.source;
  copyBases(args, small, args.bases, k.bases);
  plan::Flow* flow = nullptr;
  plan::Copy* copies = nullptr;
  plan::Entry* entries = nullptr;
  kernels::PlanPointers& plan = k.ranks[0].plan;
  plan.flow = lists.take(1, flow);
  plan.copies = lists.take(small.copies + 1, copies);
  plan.entries = lists.take(small.entries, entries);
  *flow = {0, 0, 0, 0, static_cast<std::uint32_t>(small.copies)};
  for (std::size_t i = 0; i <= small.copies; ++i) {
    const plan::Copy& copy = args.copies[args.begin + i];
    const std::uint32_t row = args.packed || i == small.copies ? static_cast<std::uint32_t>(i) : copy.token;
    copies[i] = {row, copy.firstEntry - small.firstEntry};
  }
  std::copy_n(args.entries + small.firstEntry, small.entries, entries);
  return k;
}

namespace {
std::size_t smallPlanBytes(const SmallPlan& small) {
  return 32 + (small.copies + 3) * sizeof(plan::Copy) + (small.entries + 2) * sizeof(plan::Entry);
}
}  // namespace

void CudaExecutor::place(const PlaceArgs& args) {
  if (args.begin >= args.end || args.rowBytes == 0) return;
  const cuda::OnDevice on(device_);
  Lists lists(*this, smallPlanBytes(smallPlan(args)));
  const kernels::PlaceArgs k = placeArgs(args, lists);
  lists.bring();
  cuda::place(k, budget_, stream_->get());
}

void CudaExecutor::cast(const CastArgs& args) {
  if (args.place.begin >= args.place.end || args.elements == 0) return;
  const cuda::OnDevice on(device_);
  const SmallPlan small = smallPlan(args.place);
  Lists lists(*this, smallPlanBytes(small));
  kernels::CastPlaceArgs k{};
  k.place = placeArgs(args.place, lists);
  k.place.rowBytes = args.elements * 2;
  copyBases(args.place, small, args.scaleBases, k.scaleBases);
  k.scaleStride = args.scaleStride;
  lists.bring();
  cuda::castPlace(k, budget_, stream_->get());
}

void CudaExecutor::move(const MoveArgs& args) {
  std::vector<plan::Copy> copies(args.rows + 1);
  std::vector<plan::Entry> entries(args.rows);
  for (std::size_t i = 0; i <= args.rows; ++i) {
    const auto n = static_cast<std::uint32_t>(i);
    copies[i] = {n, n};
    if (i == args.rows) break;
    if (args.sourceRows != nullptr) copies[i].token = static_cast<std::uint32_t>(args.sourceRows[i]);
    entries[i] = {0, 0, args.destinationRows != nullptr ? static_cast<std::uint32_t>(args.destinationRows[i]) : n};
  }
  PlaceArgs rows;
  rows.source = args.source;
  rows.sourceStride = args.sourceStride;
  rows.copies = copies.data();
  rows.entries = entries.data();
  rows.end = args.rows;
  std::byte* base = args.destination;
  rows.bases = &base;
  rows.destinationStride = args.destinationStride;
  rows.rowBytes = args.rowBytes;
  place(rows);
}

void CudaExecutor::sum(const SumArgs& args) {
  if (args.rows == 0 || args.elements == 0) return;
  const cuda::OnDevice on(device_);
  const std::uint32_t begin = args.first[0];
  const std::size_t terms = args.first[args.rows] - begin;
  Lists lists(*this, (2 * args.rows + 4) * sizeof(void*) + (terms + 1) * sizeof(Term) +
                         (args.rows + 5) * sizeof(std::uint32_t));
  kernels::TermSumArgs k{};
  k.rows = static_cast<int>(args.rows);
  k.elements = args.elements;
  k.type = static_cast<kernels::SumType>(args.outType);
  std::byte** out = nullptr;
  const std::byte** bias = nullptr;
  kernels::Term* term = nullptr;
  std::uint32_t* first = nullptr;
  k.out = lists.take(args.rows, out);
  std::copy_n(args.out, args.rows, out);
  if (args.bias != nullptr) {
    k.bias = lists.take(args.rows, bias);
    std::copy_n(args.bias, args.rows, bias);
  }
  k.terms = lists.take(terms, term);
  if (terms > 0) std::memcpy(static_cast<void*>(term), args.terms + begin, terms * sizeof(Term));
  k.first = lists.take(args.rows + 1, first);
  for (std::size_t i = 0; i <= args.rows; ++i) first[i] = args.first[i] - begin;
  lists.bring();
  cuda::sumTerms(k, budget_, stream_->get());
}

// The kernel keeps a product for each slot of a row: their places are those of the entries' slots.
void CudaExecutor::back(const BackArgs& args) {
  const PlaceArgs& rows = args.place;
  if (rows.begin >= rows.end || rows.rowBytes == 0) return;
  if (args.expertStride != rows.destinationStride)
    fail(Code::internalError, "executor: back: expert rows and gradient rows lie differently");
  const cuda::OnDevice on(device_);
  const SmallPlan small = smallPlan(rows);
  std::size_t most = 0;
  std::uint32_t lowest = UINT32_MAX, highest = 0;
  for (std::size_t e = 0; e < small.entries; ++e)
    most = std::max<std::size_t>(most, rows.entries[small.firstEntry + e].slot & plan::kSlotMask);
  const auto rowOf = [&](std::size_t i) {
    return rows.packed ? static_cast<std::uint32_t>(i) : rows.copies[rows.begin + i].token;
  };
  for (std::size_t i = 0; i < small.copies; ++i) {
    lowest = std::min(lowest, rowOf(i));
    highest = std::max(highest, rowOf(i));
  }
  const std::size_t slots = most + 1;
  const std::size_t products = (highest - lowest + std::size_t{1}) * slots;
  Lists lists(*this, smallPlanBytes(small) + Lists::bytesOf<float>(small.entries) + Lists::bytesOf<float>(products));
  const kernels::PlaceArgs k = placeArgs(rows, lists);
  float* weights = nullptr;
  float* dots = nullptr;
  kernels::BackArgs b{};
  b.rankCount = 1;
  b.maxTokens = k.maxTokens;
  b.topk = static_cast<int>(slots);
  b.ranks[0].plan = k.ranks[0].plan;
  b.ranks[0].plan.weights = lists.take(small.entries, weights);
  for (std::size_t e = 0; e < small.entries; ++e)
    weights[e] = args.weights == nullptr ? 1.0f : args.weights[small.firstEntry + e];
  b.ranks[0].gradient = rows.source;
  std::copy(std::begin(k.bases), std::end(k.bases), b.bases);
  copyBases(rows, small, args.expertBases, b.expertBases);
  b.type = static_cast<kernels::SumType>(args.type);
  b.elements = rows.rowBytes / elementBytes(args.type);
  b.gradientStride = rows.sourceStride;
  b.stride = rows.destinationStride;
  lists.bring();
  float* const there = lists.take(products, dots);
  b.ranks[0].dots = there - static_cast<std::size_t>(lowest) * slots;
  cuda::back(b, budget_, stream_->get());
  copy(dots, there, products * sizeof(float));
  cuda::synchronize(stream_->get());
  if (args.dots == nullptr) return;
  for (std::size_t i = 0; i < small.copies; ++i) {
    const plan::Copy* copy = rows.copies + rows.begin + i;
    for (std::uint32_t e = copy[0].firstEntry; e < copy[1].firstEntry; ++e)
      args.dots[e] = dots[(rowOf(i) - lowest) * slots + (rows.entries[e].slot & plan::kSlotMask)];
  }
}

}  // namespace fusco::exec
