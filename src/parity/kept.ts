/** Keeps the last thing made, for as long as the next one asked for has the same key. */
export class Kept<Key, Value extends Disposable> {
  #key: string | undefined
  #value: Value | undefined

  get(key: Key, make: () => Value): Value {
    const text = JSON.stringify(key)
    if (this.#value === undefined || this.#key !== text) {
      this.#value?.[Symbol.dispose]()
      this.#value = make()
      this.#key = text
    }
    return this.#value
  }
}
