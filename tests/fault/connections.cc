#include "fault/connections.h"

#include <dirent.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <set>
#include <sstream>

#include "base/handle.h"

namespace fusco::fault {

namespace {

// "0100007F:1F90"
int portIn(const std::string& address) { return std::stoi(address.substr(address.find(':') + 1), nullptr, 16); }

}  // namespace

std::vector<Ports> portsOf(const std::vector<pid_t>& pids) {
  std::set<std::string> inodes;
  for (const pid_t pid : pids) {
    const std::string folder = "/proc/" + std::to_string(pid) + "/fd";
    DIR* directory = opendir(folder.c_str());
    if (directory == nullptr) continue;
    while (const dirent* entry = readdir(directory)) {
      char target[64] = {};
      if (readlink((folder + "/" + entry->d_name).c_str(), target, sizeof(target) - 1) <= 0) continue;
      const std::string text = target;
      if (text.starts_with("socket:[")) inodes.insert(text.substr(8, text.size() - 9));
    }
    closedir(directory);
  }
  std::vector<Ports> connections;
  std::ifstream table("/proc/net/tcp");
  std::string line;
  std::getline(table, line);
  while (std::getline(table, line)) {
    std::istringstream words(line);
    std::string number, local, remote, state, skip, inode;
    words >> number >> local >> remote >> state;
    for (int i = 0; i < 5; ++i) words >> skip;
    words >> inode;
    constexpr const char* kEstablished = "01";
    if (state == kEstablished && inodes.contains(inode)) connections.push_back({portIn(local), portIn(remote)});
  }
  return connections;
}

std::string resetPorts(const std::vector<Ports>& connections) {
  std::string filter;
  for (const Ports& one : connections) {
    filter += (filter.empty() ? "" : " or ") + ("( sport = :" + std::to_string(one.local)) +
              " and dport = :" + std::to_string(one.remote) + " )";
  }
  const std::string command = "ss -K -t -n state established '( " + filter + " )' > /dev/null";
  return std::system(command.c_str()) == 0 ? "" : "failed: " + command;
}

bool canReset(std::string* why) {
  UniqueFd listener(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)),
      caller(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof(address);
  auto* const name = reinterpret_cast<sockaddr*>(&address);
  if (::bind(listener.get(), name, length) != 0 || ::listen(listener.get(), 1) != 0 ||
      ::getsockname(listener.get(), name, &length) != 0 || ::connect(caller.get(), name, length) != 0) {
    *why = "no connection over loopback";
    return false;
  }
  const int remote = ntohs(address.sin_port);
  ::getsockname(caller.get(), name, &length);
  *why = resetPorts({{ntohs(address.sin_port), remote}});
  if (!why->empty()) return false;
  pollfd polled{caller.get(), POLLIN, 0};
  char byte;
  if (::poll(&polled, 1, 500) == 1 && ::recv(caller.get(), &byte, 1, MSG_DONTWAIT) < 0 && errno != EAGAIN) return true;
  *why = "the kernel does not reset connections for `ss -K` (CONFIG_INET_DIAG_DESTROY)";
  return false;
}

}  // namespace fusco::fault
