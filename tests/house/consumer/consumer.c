#include <fusco/fusco.h>
#include <stdio.h>

int main(void) {
  int version = 0;
  if (fuscoGetVersion(&version) != fuscoSuccess || version != FUSCO_VERSION) {
    printf("version %d, header %d\n", version, FUSCO_VERSION);
    return 1;
  }
  return 0;
}
