#include "base/status.h"

#include <cerrno>
#include <cstring>

namespace fusco {

void failErrno(const std::string& what) {
  const int error = errno;
  char buffer[256];
  throw Error(Code::systemError, what + ": " + strerror_r(error, buffer, sizeof buffer));
}

}  // namespace fusco
