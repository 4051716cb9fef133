# What tests/run and bench/run share: install what is missing, configure, build. Sourced, with the repository's root as the
# working directory. Functions speak on standard output and return non-zero on failure; they never end the shell.

buildRoot=${FUSCO_BUILD_DIR:-build}
case $buildRoot in /*) ;; *) buildRoot=$PWD/$buildRoot ;; esac

passed=0
failed=0
skipped=0
skips=()     # lines that name what could not run, printed before the summary
failures=()  # lines that name what failed, each with the end of what it printed; printed after them

say() { printf '\n== %s\n' "$*"; }

countFailed() {
  failed=$((failed + 1))
  failures+=("failed: $*")
}

countSkipped() {
  skipped=$((skipped + 1))
  skips+=("skipped: $*")
}

# Prints what could not run, what failed, and the last line; the exit status of the command.
summary() {
  echo
  if ((${#skips[@]})); then printf '%s\n' "${skips[@]}"; fi
  if ((${#failures[@]})); then printf '%s\n' "${failures[@]}"; fi
  echo "$passed passed, $failed failed, $skipped skipped"
  ((failed == 0))
}

missingPackages() {
  command -v dpkg-query >/dev/null || return 0
  local package
  while read -r package; do
    case $package in '' | '#'*) continue ;; esac
    case $(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null) in
      installed) ;;
      *) printf '%s ' "$package" ;;
    esac
  done <cmake/packages.txt
}

# Installs the packages that are missing. Without the right to, or with FUSCO_INSTALL=0, prints the line that would.
installPackages() {
  local missing
  missing=$(missingPackages)
  missing=${missing% }
  [ -n "$missing" ] || return 0
  local line="apt-get install -y --no-install-recommends $missing"
  if [ "${FUSCO_INSTALL:-1}" = 0 ]; then
    say "Packages are missing and FUSCO_INSTALL=0; this line would install them:"
    echo "sudo $line"
    return 0
  fi
  local -a root=()
  if [ "$(id -u)" != 0 ]; then
    if ! sudo -n true 2>/dev/null; then
      say "Packages are missing and neither root nor sudo is at hand; this line installs them:"
      echo "sudo $line"
      return 0
    fi
    root=(sudo -n)
  fi
  say "Installing $missing"
  local -a apt=("${root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=120)
  local -a packages
  read -ra packages <<<"$missing"
  "${apt[@]}" update &&
    "${apt[@]}" install -y --no-install-recommends -o Dpkg::Use-Pty=0 "${packages[@]}" ||
    echo "Installing failed; going on with what is there. By hand: sudo $line"
}

# What the configuration NAME looked for and did not find: parts of it are left out.
missingParts() {
  sed -n -E 's/^(GTest_DIR|CLI11_DIR|MPI_CXX_COMPILER|FUSCO_CLANGXX):[A-Z]+=.*NOTFOUND$/\1/p' "$buildRoot/$1/CMakeCache.txt" 2>/dev/null |
    sed -e 's/GTest_DIR/GoogleTest (libgtest-dev, libgmock-dev)/' -e 's/CLI11_DIR/CLI11 (libcli11-dev)/' \
      -e 's/FUSCO_CLANGXX/clang (clang, libclang-rt-dev)/' \
      -e 's/MPI_CXX_COMPILER/Open MPI (openmpi-bin, libopenmpi-dev)/' | paste -sd, - | sed 's/,/, /g'
}

# gpuQuery FIELD: what nvidia-smi says of it, a line for each GPU; fails where there is no GPU.
gpuQuery() {
  local tool
  for tool in "$(command -v nvidia-smi)" /usr/bin/nvidia-smi /usr/local/nvidia/bin/nvidia-smi; do
    if [ -x "$tool" ] && "$tool" --query-gpu="$1" --format=csv,noheader 2>/dev/null; then return 0; fi
  done
  return 1
}

# What kernels are compiled for: what FUSCO_GPU_ARCHITECTURES says; this machine's GPUs; else one with bulk copies. Each also
# as PTX for those that come after it. All that FUSCO is made for takes several times as long.
gpuArchitectures() {
  local seen
  if [ -n "${FUSCO_GPU_ARCHITECTURES:-}" ]; then
    echo "$FUSCO_GPU_ARCHITECTURES"
  elif seen=$(gpuQuery compute_cap); then
    tr -d . <<<"$seen" | sort -u | paste -sd';'
  else
    echo 90
  fi
}

# configure NAME [-D...]: prepares $buildRoot/NAME; does nothing when that was done with the same options.
configure() {
  local name=$1 folder=$buildRoot/$1
  shift
  local tool
  for tool in cmake c++; do
    command -v $tool >/dev/null || { echo "$tool is not installed"; return 1; }
  done
  local -a generator=()
  if command -v ninja >/dev/null; then generator=(-G Ninja); fi
  local wanted="$PWD $*"
  # What was missing may have come since.
  if [ -f "$folder/CMakeCache.txt" ] && [ "$(cat "$folder/options" 2>/dev/null)" = "$wanted" ] &&
    [ -z "$(missingParts "$name")" ]; then
    return 0
  fi
  say "Configuring $name"
  # Other options, another place or a missing part left this folder: begin anew.
  if [ -f "$folder/CMakeCache.txt" ]; then rm -rf "$folder/CMakeCache.txt" "$folder/CMakeFiles"; fi
  cmake "${generator[@]}" -S . -B "$folder" "$@" && printf '%s\n' "$wanted" >"$folder/options"
}

# build NAME TARGET...: only what has changed.
build() {
  local name=$1
  shift
  say "Building $name"
  NINJA_STATUS='[%f/%t %es] ' cmake --build "$buildRoot/$name" -j "$(nproc)" --target "$@"
}
