let free = 3
const waiting: (() => void)[] = []

/** Runs the work of tests whose processes import torch a few at a time, which is what the machine bears. */
export async function inParallel<Result>(work: () => Promise<Result>): Promise<Result> {
  while (free === 0) await new Promise<void>((resolve) => waiting.push(resolve))
  free--
  try {
    return await work()
  } finally {
    free++
    waiting.shift()?.()
  }
}
