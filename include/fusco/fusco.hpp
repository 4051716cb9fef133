// RAII over fusco.h for C++17 and later, header only. Every failure is a fusco::Exception; objects are move-only and
// release what they hold. The semantics are those of fusco.h, which is the contract; nothing is added to it here.
#ifndef FUSCO_FUSCO_HPP_
#define FUSCO_FUSCO_HPP_

#include <fusco/fusco.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace fusco {

class Exception : public std::runtime_error {
 public:
  Exception(fuscoResult_t code, const std::string& text) : std::runtime_error(text), code_(code) {}
  fuscoResult_t code() const noexcept { return code_; }

 private:
  fuscoResult_t code_;
};

// Throws what the calling thread's last error says, unless `result` is fuscoSuccess or fuscoInProgress.
inline void check(fuscoResult_t result) {
  if (result == fuscoSuccess || result == fuscoInProgress) return;
  const std::string detail = fuscoGetLastError(nullptr);
  throw Exception(result, detail.empty() ? fuscoGetErrorString(result) : fuscoGetErrorString(result) + (": " + detail));
}

inline fuscoUniqueId uniqueId() {
  fuscoUniqueId id;
  check(fuscoGetUniqueId(&id));
  return id;
}

// The type's fuscoDataType_t, for combine.
template <typename T>
struct DataTypeOf;
template <>
struct DataTypeOf<float> {
  static constexpr fuscoDataType_t value = fuscoFloat32;
};

// An array in memory that every rank of the machine can reach: rows go straight into it. Zeroed.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::size_t size) : size_(size) {
    void* pointer = nullptr;
    if (size > 0) check(fuscoMemAlloc(&pointer, size * sizeof(T)));
    data_ = static_cast<T*>(pointer);
  }
  Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Buffer() {
    if (data_ != nullptr) fuscoMemFree(data_);
  }

  T* data() noexcept { return data_; }
  const T* data() const noexcept { return data_; }
  std::size_t size() const noexcept { return size_; }
  T* begin() noexcept { return data_; }
  T* end() noexcept { return data_ + size_; }
  const T* begin() const noexcept { return data_; }
  const T* end() const noexcept { return data_ + size_; }
  T& operator[](std::size_t i) noexcept { return data_[i]; }
  const T& operator[](std::size_t i) const noexcept { return data_[i]; }

 private:
  T* data_ = nullptr;
  std::size_t size_ = 0;
};

class Communicator {
 public:
  Communicator() = default;
  Communicator(int ranks, const fuscoUniqueId& id, int rank, const fuscoConfig_t& config = defaultConfig()) {
    check(fuscoCommInitRankConfig(&comm_, ranks, id, rank, &config));
  }
  Communicator(Communicator&& other) noexcept : comm_(std::exchange(other.comm_, nullptr)) {}
  Communicator& operator=(Communicator&& other) noexcept {
    std::swap(comm_, other.comm_);
    return *this;
  }
  ~Communicator() {
    if (comm_ != nullptr) fuscoCommDestroy(comm_);
  }

  static fuscoConfig_t defaultConfig() { return FUSCO_CONFIG_INIT; }

  // Empty where `color` is negative.
  Communicator split(int color, int key) const {
    Communicator part;
    check(fuscoCommSplit(comm_, color, key, &part.comm_, nullptr));
    return part;
  }
  void finalize() { check(fuscoCommFinalize(comm_)); }
  // Wakes every rank with an error; this object is empty afterwards.
  void abort() { check(fuscoCommAbort(std::exchange(comm_, nullptr))); }

  int size() const { return number(&fuscoCommCount); }
  int rank() const { return number(&fuscoCommUserRank); }
  int node(int rank) const {
    int node = 0;
    check(fuscoCommNode(comm_, rank, &node));
    return node;
  }
  fuscoResult_t asyncError() const {
    fuscoResult_t error = fuscoSuccess;
    check(fuscoCommGetAsyncError(comm_, &error));
    return error;
  }
  fuscoStatistics_t statistics() const {
    fuscoStatistics_t statistics = FUSCO_STATISTICS_INIT;
    check(fuscoCommGetStatistics(comm_, &statistics));
    return statistics;
  }

  fuscoComm_t get() const noexcept { return comm_; }
  explicit operator bool() const noexcept { return comm_ != nullptr; }

 private:
  int number(fuscoResult_t (*ask)(fuscoComm_t, int*)) const {
    int value = 0;
    check(ask(comm_, &value));
    return value;
  }

  fuscoComm_t comm_ = nullptr;
};

// A routing map made into a plan; any number of dispatches and combines. Destroyed before its communicator.
class Plan {
 public:
  Plan() = default;
  Plan(const Communicator& comm, const fuscoPlanConfig_t& config, cudaStream_t stream = nullptr) {
    check(fuscoPlanCreate(&plan_, &config, comm.get(), stream));
  }
  // expertIds: [tokens, topk]; weights: the same shape, or empty for all 1.
  Plan(const Communicator& comm, const std::vector<std::int64_t>& expertIds, int topk, int experts,
       const std::vector<float>& weights = {}, cudaStream_t stream = nullptr) {
    if (topk < 1 || expertIds.size() % static_cast<std::size_t>(topk) != 0 ||
        (!weights.empty() && weights.size() != expertIds.size())) {
      throw Exception(fuscoInvalidArgument, "fusco::Plan: expertIds and weights must be of tokens * topk entries");
    }
    fuscoPlanConfig_t config = FUSCO_PLAN_CONFIG_INIT;
    config.expertIds = expertIds.data();
    config.weights = weights.empty() ? nullptr : weights.data();
    config.tokens = static_cast<std::int64_t>(expertIds.size()) / topk;
    config.topk = topk;
    config.experts = experts;
    check(fuscoPlanCreate(&plan_, &config, comm.get(), stream));
  }
  Plan(Plan&& other) noexcept : plan_(std::exchange(other.plan_, nullptr)) {}
  Plan& operator=(Plan&& other) noexcept {
    std::swap(plan_, other.plan_);
    return *this;
  }
  ~Plan() {
    if (plan_ != nullptr) fuscoPlanDestroy(plan_);
  }

  static fuscoPlanConfig_t defaultConfig() { return FUSCO_PLAN_CONFIG_INIT; }

  fuscoPlanInfo_t info() const {
    fuscoPlanInfo_t info = FUSCO_PLAN_INFO_INIT;
    check(fuscoPlanGetInfo(plan_, &info));
    return info;
  }
  // Rows that dispatch's output must hold.
  std::size_t receiveRows() const { return static_cast<std::size_t>(info().receiveRows); }

  void dispatch(const void* input, void* output, std::size_t rowBytes, cudaStream_t stream = nullptr) {
    check(fuscoDispatch(plan_, input, output, rowBytes, stream));
  }
  void dispatch(const fuscoDispatchArgs_t& args, cudaStream_t stream = nullptr) {
    check(fuscoDispatchEx(plan_, &args, stream));
  }
  void combine(const void* input, void* output, std::size_t elements, fuscoDataType_t type,
               cudaStream_t stream = nullptr) {
    check(fuscoCombine(plan_, input, output, elements, type, stream));
  }
  void combine(const fuscoCombineArgs_t& args, cudaStream_t stream = nullptr) {
    check(fuscoCombineEx(plan_, &args, stream));
  }
  void combineBackward(const fuscoCombineBackwardArgs_t& args, cudaStream_t stream = nullptr) {
    check(fuscoCombineBackward(plan_, &args, stream));
  }
  void dispatchStart(const fuscoDispatchArgs_t& args, cudaStream_t stream = nullptr) {
    check(fuscoDispatchStart(plan_, &args, stream));
  }
  void combineStart(const fuscoCombineArgs_t& args, cudaStream_t stream = nullptr) {
    check(fuscoCombineStart(plan_, &args, stream));
  }
  void finish() { check(fuscoFinish(plan_)); }

  // Rows of T elements in buffers: from the tokens to the experts and back.
  template <typename T>
  void dispatch(const Buffer<T>& input, Buffer<T>& output, std::size_t elements) {
    dispatch(input.data(), output.data(), elements * sizeof(T));
  }
  template <typename T>
  void combine(const Buffer<T>& input, Buffer<T>& output, std::size_t elements) {
    combine(input.data(), output.data(), elements, DataTypeOf<T>::value);
  }

  // As text, or as JSON.
  std::string print(bool json = false) const {
    std::size_t needed = 0;
    check(fuscoPlanPrint(plan_, json, nullptr, 0, &needed));
    std::string text(needed, '\0');
    check(fuscoPlanPrint(plan_, json, text.data(), text.size(), &needed));
    text.resize(needed > 0 ? needed - 1 : 0);
    return text;
  }
  void save(const std::string& path) const { check(fuscoPlanSave(plan_, path.c_str())); }

  fuscoPlan_t get() const noexcept { return plan_; }
  explicit operator bool() const noexcept { return plan_ != nullptr; }

 private:
  fuscoPlan_t plan_ = nullptr;
};

// Calls made while it lives are carried out together by end(), or, their error dropped, when it goes out of scope.
class Group {
 public:
  Group() { check(fuscoGroupStart()); }
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;
  ~Group() {
    if (open_) fuscoGroupEnd();
  }
  void end() {
    open_ = false;
    check(fuscoGroupEnd());
  }

 private:
  bool open_ = true;
};

}  // namespace fusco

#endif  // FUSCO_FUSCO_HPP_
