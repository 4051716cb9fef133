#include "base/status.h"

#include <cerrno>
#include <cstring>

namespace fusco {

std::string ownText(Code code, const std::string& text, const std::string& name) {
  if (code == Code::remoteError) return text;
  const std::string number = name.substr(0, name.find(" ("));
  const bool there = text.rfind(number + ":", 0) == 0 || text.rfind(number + " ", 0) == 0;
  return there ? text : name + ": " + text;
}

void failErrno(const std::string& what) {
  const int error = errno;
  char buffer[256];
  throw Error(Code::systemError, what + ": " + strerror_r(error, buffer, sizeof buffer));
}

}  // namespace fusco
