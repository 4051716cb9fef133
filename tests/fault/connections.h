// The TCP connections of other processes, and how they are reset.
#pragma once

#include <sys/types.h>

#include <string>
#include <vector>

namespace fusco::fault {

// Of a connection, the ports of both ends: one alone may be that of other connections, too.
struct Ports {
  int local, remote;
};

// Of the established connections of these processes.
std::vector<Ports> portsOf(const std::vector<pid_t>& pids);

// Resets these connections by `ss -K`. What went wrong, or empty.
std::string resetPorts(const std::vector<Ports>& connections);

// Whether `ss -K` resets connections here; else why not.
bool canReset(std::string* why);

}  // namespace fusco::fault
