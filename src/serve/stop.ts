/** Lets text through up to the first of some stop strings, and holds back what may turn out to be the start of one. */
export class StopFilter {
  readonly #stops: readonly string[]
  #held = ''
  #hit = false

  constructor(stops: readonly string[]) {
    this.#stops = stops
  }

  /** Whether a stop string has come. */
  get hit(): boolean {
    return this.#hit
  }

  /** Takes further text; returns what may go out. */
  push(text: string): string {
    if (this.#hit) return ''
    const all = this.#held + text
    const ends = this.#stops.filter((stop) => all.includes(stop)).map((stop) => all.indexOf(stop) + stop.length)
    if (ends.length > 0) {
      this.#hit = true
      this.#held = ''
      // What would have decided had the text come letter by letter: the one that ends first, and who ends there too.
      const read = all.slice(0, Math.min(...ends))
      return read.slice(0, Math.min(...this.#stops.map((stop) => read.indexOf(stop)).filter((place) => place >= 0)))
    }
    const kept = Math.max(0, ...this.#stops.map((stop) => overlap(all, stop)))
    this.#held = all.slice(all.length - kept)
    return all.slice(0, all.length - kept)
  }

  /** What was held back, at the end of the text. */
  flush(): string {
    const held = this.#held
    this.#held = ''
    return held
  }
}

/** How many characters at the end of the text are the beginning of `stop`. */
function overlap(text: string, stop: string): number {
  for (let count = Math.min(text.length, stop.length - 1); count > 0; count--) {
    if (text.endsWith(stop.slice(0, count))) return count
  }
  return 0
}
