// The header as C99, as C++17, and beside the CUDA runtime's own declaration of a stream.
typedef struct CUstream_st* cudaStream_t;
#include <gtest/gtest.h>

#include <fusco/fusco.hpp>
#include <type_traits>

extern "C" int fuscoHeaderIsC(void);

namespace {

template <typename T>
constexpr bool kMoveOnly = !std::is_copy_constructible_v<T> && !std::is_copy_assignable_v<T> &&
                           std::is_nothrow_move_constructible_v<T> && std::is_nothrow_move_assignable_v<T>;
static_assert(kMoveOnly<fusco::Communicator> && kMoveOnly<fusco::Plan> && kMoveOnly<fusco::Buffer<float>>);
static_assert(std::is_base_of_v<std::runtime_error, fusco::Exception>);

TEST(Header, IsCAndItsMacrosFitItsStructs) { EXPECT_EQ(fuscoHeaderIsC(), 1); }

TEST(Header, EmptyObjectsHoldNothing) {
  EXPECT_FALSE(fusco::Communicator());
  EXPECT_FALSE(fusco::Plan());
  EXPECT_EQ(fusco::Buffer<float>().size(), 0u);
}

}  // namespace
