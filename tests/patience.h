// How long a test gives ranks that do not hang, before it ends them and says so.
#pragma once

namespace fusco::test {

// Sanitizers make everything ten times as slow, and then other tests run beside this one. CMake gives a test at least
// 120 s, and three times as long under sanitizers: each of these must stay below that, or ctest ends the test without a
// word of what hung.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
inline constexpr int kWorldSeconds = 170;    // a world of ranks
inline constexpr int kCommandSeconds = 200;  // a command that starts such a world: it is to outlive it
#else
inline constexpr int kWorldSeconds = 60;
inline constexpr int kCommandSeconds = 100;
#endif

}  // namespace fusco::test
