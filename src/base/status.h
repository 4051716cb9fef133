// Errors inside the library: an exception of type Error, turned into a code at the C boundary (src/api). A full queue
// or a missing credit is no error but a return value.
#pragma once

#include <stdexcept>
#include <string>

namespace fusco {

// The numeric values of ncclResult_t and fuscoResult_t.
enum class Code : int {
  success = 0,
  unhandledCudaError = 1,
  systemError = 2,
  internalError = 3,
  invalidArgument = 4,
  invalidUsage = 5,
  remoteError = 6,
  inProgress = 7,
};

// A failure that names what died, the rank, the peer and one thing to do.
class Error : public std::runtime_error {
 public:
  Error(Code code, const std::string& what) : std::runtime_error(what), code_(code) {}
  Code code() const noexcept { return code_; }

 private:
  Code code_;
};

// Whose failure it is, the code says: remoteError is another rank's, and its text names that one; anything else is that
// of the rank itself. Others will read its text, too: `name`, "rank 3 (host:pid)", comes in front, unless it is there.
std::string ownText(Code code, const std::string& text, const std::string& name);

[[noreturn]] inline void fail(Code code, const std::string& what) { throw Error(code, what); }

// For a system call that failed: appends strerror(errno).
[[noreturn]] void failErrno(const std::string& what);

}  // namespace fusco
