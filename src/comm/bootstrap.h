// How ranks meet: one of them opens a meeting place, all bring their record and take everyone's home.
#pragma once

#include <vector>

#include "base/clock.h"
#include "comm/record.h"
#include "comm/rendezvous.h"

namespace fusco::comm {

// Opens the meeting place and the thread that serves it.
UniqueId openMeetingPlace(Rendezvous::Patience patience = {});

// Brings the record, waits for all ranks; their records in rank order. Throws Error with the meeting place's verdict.
std::vector<Record> meet(const UniqueId& id, const Record& record, Deadline deadline);

// Ends the thread behind the id, if it runs in this process and has nothing more to do.
void leaveMeetingPlace(const UniqueId& id);

// Counts the forks of this process and its ancestors since they loaded the library.
unsigned forkCount();

// Random, the same for all ranks of a process; another one after fork.
void processIdentity(std::uint64_t identity[2]);

// The machine's boot id, hashed.
std::uint64_t machineIdentity();

// Names the namespace in which this process's pid counts; 0 if unknown.
std::uint64_t pidNamespace();

}  // namespace fusco::comm
